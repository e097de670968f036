"""Trains both sides of a dense retriever on a teacher's order of passages (Reinforced-IR, arXiv 2502.11562, RLGF).

What sentence-transformers' ``SentenceTransformerTrainer`` does is left to it. Added are: batches of one corpus only,
over all processes, since passages of another corpus are negatives that teach nothing; lists whose negatives are drawn
anew in every epoch, the same after a resume; and the loss over them, whose negatives come from all processes.

How this differs from the authors' code: gradients flow through the gather; a query whose list is too short gets
passages of other queries as negatives that have no rank, and not its own ones twice; each passage of a batch is
encoded once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from rag_rl.errors import ConfigError
from rag_rl.trainers.distillation_config import DistillationConfig
from rag_rl.trainers.distillation_loss import distillation_loss


class Example(Protocol):
    """What is learnt of one query (``rag_rl.data.reinforced_ir.RetrieverExample``)."""

    @property
    def query(self) -> str:
        """The query."""
        ...

    @property
    def answer(self) -> str:
        """Its augmentation with what is put before it; empty where there is none."""
        ...

    @property
    def pos(self) -> Sequence[str]:
        """Its passage; of several one is drawn."""
        ...

    @property
    def neg(self) -> Sequence[str]:
        """Its negatives, in the teacher's order where there is one."""
        ...

    @property
    def is_distilled(self) -> bool:
        """Whether passage and negatives stand in a teacher's order."""
        ...


class TrainableEncoder(Protocol):
    """The encoder under training (``rag_rl.retrieval.SentenceEncoder``)."""

    model: SentenceTransformer
    query_prompt: str
    document_prompt: str
    normalize: bool


@dataclass(frozen=True, slots=True)
class PassageList:
    """The passages of one query in one epoch.

    Attributes:
        passages: G numbers of texts.
        ranked: how many of them, from the first on, stand in the teacher's order.
    """

    passages: tuple[int, ...]
    ranked: int


class PassageLists:
    """Examples of several corpora as numbers of texts, and the draws of each epoch.

    Args:
        corpora: examples by corpus.
        group_size: G, passages of a list.
        num_ranked: how many of a list are ranked, at most; None for all that have a rank. Of an example that no
            teacher has ordered it is one, its passage: contrastive learning.
        seed: of the draws.

    Attributes:
        examples: all examples, one corpus after the other.
        corpus_of: number of its corpus for each example.
        texts: all passages, each once.
        short: examples with fewer negatives of their own than a list takes.

    Raises:
        ConfigError: there is no example, or a corpus has too few passages for a list.
    """

    def __init__(
        self,
        corpora: Mapping[str, Sequence[Example]],
        *,
        group_size: int,
        num_ranked: int | None = None,
        seed: int = 0,
    ) -> None:
        self.group_size, self.num_ranked, self.seed = group_size, num_ranked, seed
        self.examples = [example for examples in corpora.values() for example in examples]
        self.corpus_of = [number for number, one in enumerate(corpora.values()) for _ in one]
        if not self.examples:
            raise ConfigError("there is no query to learn from")
        known: dict[str, int] = {}
        self._own: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._pools: list[list[int]] = []
        for name, examples in corpora.items():
            of_corpus: dict[int, None] = {}
            for example in examples:
                positives = tuple(dict.fromkeys(known.setdefault(text, len(known)) for text in example.pos))
                negatives = dict.fromkeys(known.setdefault(text, len(known)) for text in example.neg)
                self._own.append((positives, tuple(one for one in negatives if one not in positives)))
                of_corpus |= dict.fromkeys((*positives, *negatives))
            if examples and len(of_corpus) < group_size:
                raise ConfigError(
                    f"a list has {group_size} passages, and all queries of {name} have {len(of_corpus)} together: "
                    "take a smaller group_size"
                )
            self._pools.append(list(of_corpus))
        self.texts = list(known)
        self.short = sum(len(negatives) < group_size - 1 for _, negatives in self._own)

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, number: int, epoch: int) -> PassageList:
        """Draws the list of one query, the same for the same epoch.

        Args:
            number: of the example.
            epoch: from 0.

        Returns:
            Its passage, negatives in the teacher's order and, where they are too few, passages of other queries.
        """
        positives, negatives = self._own[number]
        draw = random.Random(f"{self.seed}/{epoch}/{number}")
        own = [draw.choice(positives)]
        wanted = self.group_size - 1
        if len(negatives) > wanted:
            own += [negatives[place] for place in sorted(draw.sample(range(len(negatives)), wanted))]
        else:
            own += negatives
        most = (self.num_ranked or len(own)) if self.examples[number].is_distilled else 1
        ranked = min(most, len(own))
        if len(own) < self.group_size:
            excluded = {*own, *positives}
            others = [one for one in self._pools[self.corpus_of[number]] if one not in excluded]
            # A corpus of few passages: another passage of the query's own is better than none.
            others = (
                others
                if len(others) >= self.group_size - len(own)
                else [*others, *(one for one in positives if one not in own)]
            )
            own += draw.sample(others, self.group_size - len(own))
        return PassageList(tuple(own), ranked)


class OneCorpusSampler(Sampler[int]):
    """Orders examples so that each batch, over all processes, is of one corpus; what fills no batch is left out.

    Args:
        corpus_of: number of its corpus for each example.
        batch_size: queries a batch, over all processes.
        seed: of the order.
        epoch: tells the epoch that begins.
    """

    def __init__(self, corpus_of: Sequence[int], *, batch_size: int, seed: int, epoch: Any) -> None:
        self.batch_size, self.seed, self._epoch = batch_size, seed, epoch
        self._rows: dict[int, list[int]] = {}
        for row, corpus in enumerate(corpus_of):
            self._rows.setdefault(corpus, []).append(row)

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size for rows in self._rows.values()) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self._epoch()}")
        batches = []
        for rows in self._rows.values():
            mixed = draw.sample(rows, len(rows))
            ends = range(self.batch_size, len(rows) + 1, self.batch_size)
            batches += [mixed[end - self.batch_size : end] for end in ends]
        draw.shuffle(batches)
        for batch in batches:
            yield from batch


class DistillationTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Trains an encoder, queries and documents alike, on lists of passages in a teacher's order.

    Args:
        encoder: its model is trained in place (whole, or an adapter that was added to it).
        args: settings.
        corpora: examples by corpus; a batch is of one corpus.
        callbacks: of the trainer.

    Attributes:
        lists: the examples, and what each epoch draws of them.

    Raises:
        ConfigError: no corpus fills a batch, or its passages are fewer than a list takes.
    """

    training_args_class = DistillationConfig

    def __init__(
        self,
        *,
        encoder: TrainableEncoder,
        args: DistillationConfig,
        corpora: Mapping[str, Sequence[Example]],
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.lists = PassageLists(corpora, group_size=args.group_size, num_ranked=args.num_ranked, seed=args.seed)
        # The same in every process, whatever its batch holds: vectors of augmentations are gathered, or not.
        self._contrasts = args.augmentation_weight > 0.0 and any(example.answer for example in self.lists.examples)
        super().__init__(
            model=encoder.model,
            args=args,
            train_dataset=Dataset.from_dict({"number": list(range(len(self.lists)))}),
            loss=_NoLoss(encoder.model),
            data_collator=_numbers,
            callbacks=list(callbacks or []),
        )
        whole = args.train_batch_size * self.accelerator.num_processes
        if not len(self._sampler(whole)):
            largest = max(len(examples) for examples in corpora.values())
            raise ConfigError(f"a batch takes {whole} queries of one corpus, the largest has {largest}")

    def _sampler(self, batch_size: int) -> OneCorpusSampler:
        return OneCorpusSampler(
            self.lists.corpus_of, batch_size=batch_size, seed=self.args.seed, epoch=lambda: self.epoch
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of example numbers; their lists are drawn when they are used."""
        # Each process takes every num_processes-th batch: side by side they make one of one corpus.
        whole = self.args.train_batch_size * self.accelerator.num_processes
        loader: DataLoader[Any] = self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.train_batch_size,
            sampler_fn=lambda _: self._sampler(whole),
            is_training=True,
        )
        self._steps_per_epoch = max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))
        return loader

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, counted from finished steps: a resume changes nothing."""
        return int(self.state.global_step // self._steps_per_epoch)

    def _prepare_inputs(self, inputs: list[int]) -> dict[str, Any]:
        epoch = self.epoch
        drawn = [self.lists.draw(number, epoch) for number in inputs]
        return {
            "examples": [self.lists.examples[number] for number in inputs],
            "passages": torch.tensor([one.passages for one in drawn]),
            "ranked": torch.tensor([one.ranked for one in drawn]),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            model: the encoder, possibly wrapped.
            inputs: examples, their passages (B, G) by number, and how many of them are ranked.
            return_outputs: not supported.
            num_items_in_batch: not used; the loss is a mean.

        Returns:
            A scalar.
        """
        del return_outputs, num_items_in_batch
        args, device = self.args, self.args.device
        examples, numbers = inputs["examples"], inputs["passages"]
        different, places = numbers.unique(return_inverse=True)
        texts = [self.lists.texts[number] for number in different.tolist()]
        queries = self.encode(model, [example.query for example in examples], side="query")
        passages = self.encode(model, texts, side="document")[places.to(device)]
        augmented = torch.tensor([bool(example.answer) for example in examples])
        # What has no augmentation is not looked at; some encoders have no vector for nothing.
        texts = [example.answer or example.query for example in examples]
        augmentations = self.encode(model, texts, side=args.augmentation_side) if self._contrasts else None
        found = distillation_loss(
            queries,
            passages,
            augmentations,
            augmented=augmented.to(device) if self._contrasts else None,
            ranked=inputs["ranked"].to(device),
            passage_ids=numbers.to(device) if args.mask_known else None,
            temperature=args.ranking_temperature,
            augmentation_temperature=args.augmentation_temperature,
            augmentation_weight=args.augmentation_weight,
            norm_weight=0.0 if self.encoder.normalize else args.norm_weight,
        )
        parts = {"ranking": found.ranking, "augmentation": found.augmentation, "norm": found.norm}
        self.track_loss_components(parts if self._contrasts else {"ranking": found.ranking})
        return found.total

    def encode(self, model: nn.Module, texts: Sequence[str], *, side: str) -> Tensor:
        """Vectors that gradients flow through.

        Args:
            model: the encoder, possibly wrapped.
            texts: N texts.
            side: ``"query"`` or ``"document"``, which prompt is put before them.

        Returns:
            (N, D), normalised as the encoder does it.
        """
        prompt = self.encoder.query_prompt if side == "query" else self.encoder.document_prompt
        features = self.encoder.model.preprocess(list(texts), prompt=prompt or None)
        features = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in features.items()}
        vectors: Tensor = model(features)["sentence_embedding"]
        return nn.functional.normalize(vectors, dim=-1) if self.encoder.normalize else vectors


class _NoLoss(nn.Module):
    """Stands where sentence-transformers wants a loss; it takes the optimiser's parameters from there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(row["number"]) for row in rows]
