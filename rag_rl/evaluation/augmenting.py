"""An assembly that searches with augmented queries: what training an augmenter is evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_rl.errors import ConfigError
from rag_rl.evaluation.assembly import Answered, Asked
from rag_rl.evaluation.scoring import Row, make_row, retrieval_scores
from rag_rl.types import Generation, Generator, Question, Retriever

if TYPE_CHECKING:
    from rag_rl.retrieval.augmented import AugmentedRetriever, Augmenter


class AugmentingAssembly:
    """Queries, what an augmenter writes to them, and what is found with both. Evaluation is greedy.

    Args:
        retriever: searches with the bare queries.
        augment: makes an augmenter of a generator.
        mix: puts an augmenter before the retriever.
        top_k: passages a query, at least 10 for ``ndcg@10`` as it is known.

    Raises:
        ConfigError: ``top_k`` below 1.
    """

    def __init__(
        self,
        retriever: Retriever,
        augment: Callable[[Generator], Augmenter],
        mix: Callable[[Augmenter], AugmentedRetriever],
        *,
        top_k: int,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        self.retriever, self.augment, self.mix, self.top_k = retriever, augment, mix, top_k
        self.augmented: AugmentedRetriever | None = None
        self.bare = False

    def without_augmentation(self) -> AugmentingAssembly:
        """The same queries as they are, whatever is trained: a baseline.

        Returns:
            A new assembly.
        """
        twin = copy.copy(self)
        twin.bare, twin.augmented = True, None
        return twin

    def with_generator(self, generator: Generator) -> AugmentingAssembly:
        """The same assembly around a generator.

        Args:
            generator: writes the augmentations.

        Returns:
            A new assembly that shares the retriever.
        """
        twin = copy.copy(self)
        if not self.bare:
            twin.augmented = self.mix(_Noted(self.augment(generator)))
        return twin

    def under_training(self, trainer: Any, *, batch_size: int) -> AugmentingAssembly:
        """The same assembly around the policy of a trainer.

        Args:
            trainer: of TRL, or anything that ``PolicyGenerator`` takes.
            batch_size: augmentations a batch.

        Returns:
            A new assembly.
        """
        from rag_rl.generation import PolicyGenerator

        return self.with_generator(PolicyGenerator(trainer, batch_size=batch_size))

    def reloaded(self, folder: Path, *, device: Any, batch_size: int) -> AugmentingAssembly:
        """The same assembly around a model that was saved.

        Args:
            folder: a run folder.
            device: where the model goes.
            batch_size: augmentations a batch.

        Returns:
            A new assembly.
        """
        if self.bare:
            return self
        from rag_rl.generation import TransformersGenerator

        return self.with_generator(
            TransformersGenerator.from_pretrained(str(folder), device=device, batch_size=batch_size)
        )

    def texts(self, queries: Sequence[str]) -> list[str | None]:
        """What the augmenter writes, greedily, in one call.

        Args:
            queries: B queries.

        Returns:
            B texts without the prefix; None where there is none.

        Raises:
            ConfigError: the assembly has no generator.
            BackendError: as the generator raises it.
        """
        if self.augmented is None:
            raise ConfigError("this assembly has no generator: nobody writes augmentations")
        return self.augmented.augmenter.augment(
            queries,
            task_instruction=self.augmented.task_instruction,
            answer_type=self.augmented.answer_type,
        )

    def answer(self, questions: Sequence[Question]) -> list[list[Answered]]:
        """Searches for queries.

        Args:
            questions: B queries with gold documents.

        Returns:
            B lists of one answer: its ``hits`` are what was found, its ``generation`` is the augmentation.

        Raises:
            ConfigError: the assembly has no generator, or ``top_k`` is more than there are passages.
            BackendError: the index or the generator failed.
        """
        asked = [question.question for question in questions]
        said: Sequence[str | None] = [None] * len(asked)
        if self.bare:
            found = self.retriever.search(asked, top_k=self.top_k)
        elif self.augmented is None:
            raise ConfigError("this assembly has no generator: nobody writes augmentations")
        else:
            found = self.augmented.search(asked, top_k=self.top_k)
            if isinstance(self.augmented.augmenter, _Noted):
                said = self.augmented.augmenter.last or said
        return [
            [Answered(Asked(question, tuple(hits), tuple(hits), question.question), Generation(text or ""), None)]
            for question, hits, text in zip(questions, found, said, strict=True)
        ]

    def row(self, answered: Answered) -> Row:
        """Scores one search.

        Args:
            answered: of ``answer``.

        Returns:
            A row with ``recall@k success@k mrr@10 ndcg@10`` and, where there is an augmenter, ``augmentation_words``,
            the length of what it wrote.
        """
        scores = retrieval_scores(answered.asked.hits, answered.asked.question.gold_doc_ids, top_k=self.top_k)
        if not self.bare:
            scores["augmentation_words"] = float(len(answered.generation.text.split()))
        return make_row(answered, scores)


class _Noted:
    """An augmenter that keeps what it wrote last, for the rows."""

    def __init__(self, augmenter: Augmenter) -> None:
        self.augmenter = augmenter
        self.last: list[str | None] = []

    @property
    def fingerprint(self) -> str:
        return self.augmenter.fingerprint

    @property
    def template(self) -> str | None:
        found: str | None = getattr(self.augmenter, "template", None)
        return found

    def augment(self, queries: Sequence[str], *, task_instruction: str, answer_type: str) -> list[str | None]:
        self.last = self.augmenter.augment(queries, task_instruction=task_instruction, answer_type=answer_type)
        return self.last
