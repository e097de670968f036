"""Rounds in which augmenter and retriever teach each other: what each step starts from, and what is kept of it.

The steps are run folders of their own (``round_1/queries``, ``round_1/augmenter``, ``round_1/retriever``, ...), each
with a manifest (``rag_rl.config.steps``). The pair of the moment is whatever the steps before have left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments, PreferenceArguments
from rag_rl.config.augmenters import (
    augmentation_task,
    build_augmented_encoder,
    build_augmented_retriever,
    build_augmenter,
    build_dense_index,
    build_queries,
    wrap_generator,
)
from rag_rl.config.distillation import DistillationData
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.parts import build_encoder, expand
from rag_rl.config.self_boosting_arguments import BoostArguments, retriever_training
from rag_rl.config.steps import content_digest, note, open_step
from rag_rl.config.synthesis import build_synthesis_corpus
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.config.synthetic import FOLDER, ensure_queries, queries_written
from rag_rl.data.reinforced_ir import is_text_array
from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.augmenting import AugmentingAssembly
from rag_rl.evaluation.retrieval import RetrievalAssembly
from rag_rl.run import RUNTIME_KEYS, Run, main_process_only, write_whole
from rag_rl.types import Question

if TYPE_CHECKING:
    from rag_rl.config.augmenters import SourcedQuery
    from rag_rl.generation import QueryAugmenter
    from rag_rl.retrieval import DenseRetriever, SentenceEncoder

logger = logging.getLogger(__name__)

GATE_METRIC = "ndcg@10"
"""What decides on held-out synthetic queries."""
AUGMENTER, RETRIEVER, QUERIES = "augmenter", "retriever", "queries"

# Settings that name something; what it holds is among the inputs of a step.
_DATA = frozenset(one.name for one in fields(DataArguments)) - {
    "data_text_columns", "data_title_column", "data_id_column", "data_chunk_tokens", "data_chunk_overlap",
}  # fmt: skip
_ENCODER = frozenset(one.name for one in fields(RetrieverArguments)) - {"retriever_top_k"}
_MODELS = ("model_name_or_path", "augmenter_model", "synthesis_model", "distill_reranker", "distill_miner")
_FILES = (
    "preference_file", "distill_answers", "augmenter_prompt", "augmenter_tasks", "distill_prompt", "synthesis_prompt",
    "synthesis_check_prompt", "synthesis_tasks",
)  # fmt: skip


class Boosting:
    """A pair of augmenter and retriever, and the steps that may make a better one of it.

    Args:
        run: opened ``in_steps``.
        boost: rounds and gate.
        data: corpus and, perhaps, questions of people to evaluate on; a plain ``corpus.json`` becomes documents.
        synthesis: who writes queries.
        retriever: the encoder to start from.
        augmenter: how an augmenter is asked, and how what it writes is mixed in.
        model: TRL's ``ModelConfig``: the augmenter to start from.

    Attributes:
        rounds: their numbers, from 1.
        model: names the augmenter of the moment.
        retriever: names the encoder of the moment.
        questions: what the pair is evaluated on, as soon as it was measured: questions of people or, where there are
            none, the synthetic ones that round 1 holds out.

    Raises:
        ConfigError: a setting does not fit.
        DataError: the corpus is missing.
    """

    def __init__(
        self,
        run: Run,
        boost: BoostArguments,
        data: DataArguments,
        synthesis: SynthesisArguments,
        retriever: RetrieverArguments,
        augmenter: AugmenterArguments,
        model: Any,
    ) -> None:
        if data.data_train:
            raise ConfigError("data_train is written here, round by round; queries that are there go to boost_queries")
        if augmenter.augmenter_weight == 1.0:
            raise ConfigError("augmenter_weight 1 leaves augmentations out of the search: there is nothing to learn")
        self.run, self.boost, self.data, self.synthesis, self.augmenter = run, boost, data, synthesis, augmenter
        self.rounds = range(1, boost.boost_rounds + 1)
        self.model, self.retriever = model, retriever
        self.questions: list[Question] = []
        self._index: tuple[RetrieverArguments, DenseRetriever] | None = None
        self._queries: dict[int, tuple[list[SourcedQuery], list[Question], list[Question]]] = {}
        self._told: dict[int, dict[str, Any]] = {}
        self._steps: list[Run] = []
        source = Path(expand(data.data_corpus))
        if source.suffix == ".json" and source.is_file() and is_text_array(source):
            made = run.folder / f"corpus_{content_digest(str(source))[:8]}"
            with main_process_only() as main:
                if main:
                    made.mkdir(exist_ok=True)
                    build_synthesis_corpus(data, made)
            build_synthesis_corpus(data, made)
        self._corpus = content_digest(data.data_corpus)

    @property
    def index(self) -> DenseRetriever:
        """The corpus by the retriever of the moment."""
        if self._index is None or self._index[0] is not self.retriever:
            self._index = (self.retriever, build_dense_index(self.retriever, self.data))
        return self._index[1]

    def measure_before(self) -> None:
        """Evaluates the untrained pair, and its retriever without augmentation, once.

        Raises:
            ConfigError: a setting does not fit.
            DataError: a file is missing or has bad rows, or a model cannot be loaded.
            BackendError: an endpoint, the index or the disk is broken.
        """
        _, held_out, people = self._learnable(1)
        self.questions = people or held_out
        of = self._fingerprint()
        self.run.measure("before", self._pair, self.questions, of=of)
        self.run.measure("no_augmentation", lambda: self._assembly().without_augmentation(), self.questions, of=of)

    def write_queries(self, number: int) -> DistillationData:
        """Writes queries for the corpus, by a seed of the round, and holds some of them out.

        Which ones depends on their words alone: what is held out in one round is learnt from in no other.

        Args:
            number: of the round.

        Returns:
            The corpus by the retriever of the moment, queries to learn from, and those for the gate.

        Raises:
            ConfigError: a setting does not fit.
            DataError: the corpus is missing, empty or has bad rows, or too few queries came of it.
            BackendError: an endpoint or the disk is broken.
        """
        learnt, held_out, _ = self._learnable(number)
        return DistillationData(self.index, learnt, held_out)

    def augmenter_step(
        self, number: int, found: DistillationData, preferences: PreferenceArguments, training: Any
    ) -> tuple[Run, Any, Any, AugmentingAssembly]:
        """Opens the step in which the augmenter learns what the retriever of the moment prefers.

        Args:
            number: of the round.
            found: as from ``write_queries``.
            preferences: which augmentations are compared.
            training: TRL's ``DPOConfig``.

        Returns:
            The step; its settings of training; its ``ModelConfig``, which names the augmenter of the moment; and how
            the pair is evaluated.
        """
        step = self._step(
            number,
            AUGMENTER,
            found,
            recipe="dpo_augmenter",
            arguments=(self.data, self.retriever, self.augmenter, preferences, training, self.model),
        )
        return step, _of_step(step, training), replace(self.model), self._assembly()

    def retriever_step(
        self,
        number: int,
        found: DistillationData,
        distill: DistillationArguments,
        encoder: QueryEncoderArguments,
        own_training: Any,
        training: Any,
    ) -> tuple[Run, Any, AugmenterModelArguments]:
        """Opens the step in which the retriever learns from the augmenter of the moment.

        Args:
            number: of the round.
            found: as from ``write_queries``.
            distill: negatives and teacher.
            encoder: what of the encoder is trained.
            own_training: ``RetrieverTrainingArguments``.
            training: TRL's ``DPOConfig``, for what those leave unset.

        Returns:
            The step; its settings of training; and who augments, and ranks.
        """
        writer = _writer(self.model)
        settings = retriever_training(own_training, training)
        step = self._step(
            number,
            RETRIEVER,
            found,
            recipe="distill_retriever",
            arguments=(self.data, self.retriever, encoder, self.augmenter, writer, distill, settings),
        )
        return step, retriever_training(own_training, _of_step(step, training)), writer

    def search(self, found: DistillationData, encoder: SentenceEncoder) -> RetrievalAssembly:
        """How the pair is evaluated while its encoder is trained.

        Args:
            found: as from ``write_queries``.
            encoder: the one that will be trained.

        Returns:
            An assembly in which the augmenter of the moment has its say.
        """
        asked = self._asked()
        instruction, answer_type = augmentation_task(self.augmenter)
        queries = [question.question for question in found.held_out]
        texts = asked.augment(queries, task_instruction=instruction, answer_type=answer_type)
        # The texts depend on no encoder: they are written once, and the model need not stay.
        written = _Written(dict(zip(queries, texts, strict=True)), asked.fingerprint)
        return RetrievalAssembly(
            found.index.passages,
            found.held_out,
            encoder,
            top_k=self.retriever.retriever_top_k,
            wrap=partial(build_augmented_encoder, self.augmenter, augmenter=written),
        )

    def keep(self, step: Run) -> None:
        """Lets a finished step's part take the place of the one before, where the gate lets it.

        Args:
            step: finished; its manifest is told what was decided, and by which figures.
        """
        summary = json.loads((step.folder / "metrics.json").read_text(encoding="utf-8"))
        before, after = summary["before"][GATE_METRIC], summary["after"][GATE_METRIC]
        kept = not self.boost.gate or after - before > self.boost.gate_min_gain
        told = {
            "kept": kept,
            "gate": {
                "metric": GATE_METRIC,
                "before": before,
                "after": after,
                "ci95": summary["ci95"][GATE_METRIC],
                "queries": summary["n_eval"],
                "decides": self.boost.gate,
            },
        }
        with main_process_only() as main:
            if main:
                note(step.folder, **told)
        part = step.folder.name
        number = int(step.folder.parent.name.removeprefix("round_"))
        self._told.setdefault(number, {})[part] = {**told, "train_seconds": summary["train_seconds"]}
        self._steps.append(step)
        logger.info(
            "round %d, %s: %s on %d held-out synthetic queries %.3f -> %.3f: %s",
            number, part, GATE_METRIC, summary["n_eval"], before, after, "kept" if kept else "not kept",
        )  # fmt: skip
        if kept and part == AUGMENTER:
            self.model = replace(self.model, model_name_or_path=str(step.folder))
        elif kept:
            self.retriever = replace(self.retriever, retriever_encoder=str(step.folder), retriever_index_path=None)

    def finish(self) -> dict[str, Any]:
        """Saves the pair that was kept, evaluates it as reloaded from the run folder, and writes the report.

        Its retriever without augmentation is evaluated as well.

        Returns:
            The content of ``metrics.json``.

        Raises:
            BackendError: the index or the disk failed.
        """
        from rag_rl.evaluation.rounds import joined_history, rounds_section

        self._save_pair()
        of = self._fingerprint()
        self.run.measure("after", self._pair, self.questions, of=of)
        bare = "kept_retriever_alone"  # whether the augmenter still helps it
        self.run.measure(bare, lambda: self._assembly().without_augmentation(), self.questions, of=of)
        rounds = [{"round": number, **self._told[number]} for number in self.rounds]
        logs = [json.loads((step.folder / "trainer_state.json").read_text()) for step in self._steps]
        history = joined_history(
            (step.folder.name, log["log_history"]) for step, log in zip(self._steps, logs, strict=True)
        )
        on = "questions of people" if self.data.data_eval else "synthetic queries that were held out in round 1"
        summary: dict[str, Any] = {}
        with main_process_only() as main:
            if main:
                seconds = sum(told[part]["train_seconds"] for told in rounds for part in (AUGMENTER, RETRIEVER))
                write_whole(self.run.folder / "train_seconds.json", json.dumps({"train_seconds": seconds}))
                write_whole(self.run.folder / "trainer_state.json", json.dumps({"log_history": history}, indent=2))
                summary = self.run.write_results(
                    history,
                    examples=self.boost.report_examples,
                    sections=[rounds_section(rounds, metric=GATE_METRIC)],
                    more={"evaluated_on": on, "rounds": rounds},
                )
        return summary

    def _step(
        self, number: int, part: str, found: DistillationData | None, *, recipe: str, arguments: Sequence[Any]
    ) -> Run:
        settings = {one.name: getattr(given, one.name) for given in arguments for one in fields(given)}
        inputs: dict[str, Any] = {"corpus": self._corpus}
        inputs |= {name: content_digest(settings[name], model=True) for name in _MODELS if settings.get(name)}
        inputs |= {name: content_digest(settings[name]) for name in _FILES if settings.get(name)}
        inputs |= {
            f"distill_files {n}": content_digest(name) for n, name in enumerate(settings.get("distill_files", ()))
        }
        if found is not None:
            inputs["retriever"] = found.index.fingerprint
            inputs[QUERIES] = _digest([(one.question.qid, one.text, one.rows) for one in found.queries])
            inputs["held out"] = _digest([(one.qid, one.question, one.gold_doc_ids) for one in found.held_out])
        name = f"round_{number}/{part}"
        return open_step(
            self.run,
            name,
            recipe=recipe,
            seed=_seed(self.run.seed, name),
            arguments=arguments,
            inputs=inputs,
            ignore={*_DATA, *_ENCODER, *_MODELS, *_FILES, "distill_files"},
        )

    def _learnable(self, number: int) -> tuple[list[SourcedQuery], list[Question], list[Question]]:
        """Queries of a round to learn from, those for the gate, and questions of people."""
        if number in self._queries:
            return self._queries[number]
        passages = self.index.passages  # what is quickly refused comes before anything is written
        data = replace(self.data, data_train_size=None)
        if self.boost.boost_queries:
            data.data_train = self.boost.boost_queries[number - 1]
        else:
            written = replace(data, data_eval=None, data_eval_qrels=None)
            step = self._step(number, QUERIES, None, recipe="synthesize_queries", arguments=(written, self.synthesis))
            if not queries_written(step.folder):
                ensure_queries(written, self.synthesis, self.retriever, step.folder, seed=step.seed)
            data.data_train = str(step.folder / FOLDER)
        if not data.data_eval:
            data.data_eval_size = 1  # split off, and put back
        queries, others = build_queries(data, passages, seed=self.run.seed)
        if not data.data_eval:
            queries, others = [*queries, *others], []
        share = self.boost.gate_share
        gate = [query for query in queries if _draw(self.run.seed, query.text) < share]
        learnt = [query for query in queries if _draw(self.run.seed, query.text) >= share]
        if not gate or not learnt:
            raise DataError(
                f"round {number}: of {len(queries)} queries gate_share {share} holds out {len(gate)}, and "
                f"{len(learnt)} are left to learn from: write more queries"
            )
        if self.data.data_train_size is not None:
            of_round = _seed(self.run.seed, f"round_{number}")
            learnt = sorted(learnt, key=lambda query: _draw(of_round, query.text))[: self.data.data_train_size]
        self._told.setdefault(number, {})[QUERIES] = {
            "usable": len(queries),
            "learnt": len(learnt),
            "held_out": len(gate),
        }
        self._queries[number] = learnt, [one.question for one in gate], [one.question for one in others]
        return self._queries[number]

    def _assembly(self) -> AugmentingAssembly:
        return AugmentingAssembly(
            self.index,
            augment=partial(wrap_generator, self.augmenter),
            mix=partial(build_augmented_retriever, self.augmenter, self.index),
            top_k=self.retriever.retriever_top_k,
        )

    def _pair(self) -> AugmentingAssembly:
        """The pair of the moment."""
        return self._assembly().with_generator(self._asked().generator)

    def _asked(self) -> QueryAugmenter:
        asked = build_augmenter(self.augmenter, _writer(self.model))
        assert asked is not None
        return asked

    def _fingerprint(self) -> str:
        """Tells the pair of the moment, and what it is asked, from others."""
        settings = {name: value for name, value in asdict(self.augmenter).items() if name not in RUNTIME_KEYS}
        told = [
            self.index.fingerprint,
            content_digest(self.model.model_name_or_path, model=True),
            settings,
            self.retriever.retriever_top_k,
            [(one.qid, one.question, list(one.gold_doc_ids)) for one in self.questions],
        ]
        return _digest(told)

    def _save_pair(self) -> None:
        """Saves augmenter and retriever as folders that need no other."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from rag_rl.generation import ScriptedGenerator

        folders = {part: self.run.folder / part for part in (AUGMENTER, RETRIEVER)}
        with main_process_only() as main:
            if main:
                for folder in folders.values():
                    shutil.rmtree(folder, ignore_errors=True)
                source = {"pretrained_model_name_or_path": expand(self.model.model_name_or_path or "")}
                source |= {"revision": self.model.model_revision}
                AutoModelForCausalLM.from_pretrained(**source, dtype="auto").save_pretrained(folders[AUGMENTER])
                AutoTokenizer.from_pretrained(**source).save_pretrained(folders[AUGMENTER])
                encoder = build_encoder(self.retriever)
                asked = wrap_generator(self.augmenter, ScriptedGenerator([]))  # only to keep how it is asked
                build_augmented_encoder(self.augmenter, encoder, asked).save(folders[AUGMENTER])
                encoder.model.prompts.update(query=encoder.query_prompt, document=encoder.document_prompt)
                encoder.model.save_pretrained(str(folders[RETRIEVER]), create_model_card=False)
        self.model = replace(self.model, model_name_or_path=str(folders[AUGMENTER]), model_revision="main")
        self.retriever = replace(self.retriever, retriever_encoder=str(folders[RETRIEVER]), retriever_index_path=None)


class _Written:
    """An augmenter that has written everything already."""

    def __init__(self, texts: Mapping[str, str | None], fingerprint: str) -> None:
        self.texts, self.fingerprint = texts, fingerprint

    def augment(self, queries: Sequence[str], **_: str) -> list[str | None]:
        return [self.texts[query] for query in queries]


def _writer(model: Any) -> AugmenterModelArguments:
    return AugmenterModelArguments(
        augmenter_name="local",
        augmenter_model=model.model_name_or_path,
        augmenter_dtype=None if model.dtype == "auto" else model.dtype,
    )


def _of_step(step: Run, training: Any) -> Any:
    """Settings of training, with the folder, the seed and the resume point of a step."""
    return replace(training, output_dir=str(step.folder), seed=step.seed, resume_from_checkpoint=step.checkpoint)


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _seed(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=4).digest(), "big") % 2**31


def _draw(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(f"{seed}/{words}".encode(), digest_size=8).digest(), "big") / 2**64
