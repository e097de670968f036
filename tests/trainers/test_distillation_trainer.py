"""The distillation trainer: lists of an epoch, batches of one corpus, loss, resume, saving, two processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rag_rl.errors import ConfigError
from rag_rl.retrieval import SentenceEncoder
from rag_rl.tiny import FOLDER
from rag_rl.trainers.distillation_config import DistillationConfig
from rag_rl.trainers.distillation_loss import distillation_loss
from rag_rl.trainers.distillation_trainer import DistillationTrainer, OneCorpusSampler, PassageLists


@dataclass(frozen=True)
class Row:
    """An example as the trainer sees it."""

    query: str
    answer: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    is_distilled: bool = True


def rows(count: int = 8, *, name: str = "number", answers: bool = True, negatives: int = 5) -> list[Row]:
    return [
        Row(
            f"Where does {name} {i} live?",
            f"{name} {i} lives somewhere." if answers and i != 1 else "",
            (f"{name} {i} lives in house {i}.",),
            tuple(f"{name} {i} once met {j}." for j in range(negatives)),
        )
        for i in range(count)
    ]


def trainer_of(folder, corpora=None, *, prepare=None, **options) -> DistillationTrainer:
    torch.manual_seed(0)
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    if prepare is not None:
        prepare(encoder)
    args = DistillationConfig(
        output_dir=str(folder),
        **{
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "group_size": 4,
            "save_steps": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )
    return DistillationTrainer(encoder=encoder, args=args, corpora=corpora or {"one": rows()})


# ---- lists


def test_a_list_is_in_the_teachers_order_and_drawn_anew_in_every_epoch():
    lists = PassageLists({"one": rows(3)}, group_size=4, seed=1)
    drawn = [lists.draw(2, epoch) for epoch in range(8)]
    assert drawn == [lists.draw(2, epoch) for epoch in range(8)]
    assert len({one.passages for one in drawn}) > 1
    order = [*rows(3)[2].pos, *rows(3)[2].neg]
    for one in drawn:
        places = [order.index(lists.texts[number]) for number in one.passages]
        assert places[0] == 0
        assert places == sorted(places)
        assert (len(set(places)), one.ranked) == (4, 4)


def test_a_short_list_gets_passages_of_other_queries_that_have_no_rank():
    lists = PassageLists({"one": rows(3, negatives=1), "two": rows(5, name="other")}, group_size=4)
    assert lists.short == 3
    found = lists.draw(0, 0)
    texts = [lists.texts[number] for number in found.passages]
    assert texts[:2] == ["number 0 lives in house 0.", "number 0 once met 0."]
    assert found.ranked == 2
    assert all(text.startswith("number") for text in texts), "of its own corpus"
    assert len(set(texts)) == 4


def test_without_a_teacher_the_passage_alone_is_ranked():
    plain = [Row(one.query, one.answer, one.pos, one.neg, is_distilled=False) for one in rows(2)]
    assert PassageLists({"one": plain}, group_size=4).draw(0, 0).ranked == 1
    assert PassageLists({"one": rows(2)}, group_size=4, num_ranked=3).draw(0, 0).ranked == 3
    assert PassageLists({"one": plain}, group_size=4, num_ranked=3).draw(0, 0).ranked == 1


def test_copies_of_the_passage_among_the_negatives_are_dropped():
    row = Row("q", "", ("a", "b"), ("b", "c", "a", "c", "d"))
    lists = PassageLists({"one": [row]}, group_size=3)
    found = {tuple(lists.texts[n] for n in lists.draw(0, epoch).passages) for epoch in range(20)}
    assert found == {("a", "c", "d"), ("b", "c", "d")}, "of two positives one is drawn, the other is no negative"


def test_too_few_passages_for_a_list():
    with pytest.raises(ConfigError, match="a list has 4 passages, and all queries of one have 3 together"):
        PassageLists({"one": [Row("q", "", ("a",), ("b", "c", "c"))]}, group_size=4)
    with pytest.raises(ConfigError, match="there is no query to learn from"):
        PassageLists({"one": []}, group_size=4)
    # The second positive has to do, where there is nothing else.
    lists = PassageLists({"one": [Row("q", "", ("a", "b"), ("c",))]}, group_size=3)
    assert sorted(lists.draw(0, 0).passages) == [0, 1, 2]


# ---- batches


def test_a_batch_is_of_one_corpus():
    epoch = [0]
    sampler = OneCorpusSampler([0] * 7 + [1] * 5, batch_size=3, seed=2, epoch=lambda: epoch[0])
    first = list(sampler)
    assert len(first) == len(sampler) == 9
    assert len(set(first)) == 9
    for start in range(0, 9, 3):
        assert len({row < 7 for row in first[start : start + 3]}) == 1
    assert first == list(sampler)
    epoch[0] = 1
    assert first != list(sampler)


def test_batches_of_the_trainer_are_of_one_corpus(tmp_path):
    corpora = {"one": rows(7), "two": rows(6, name="other")}
    trainer = trainer_of(tmp_path, corpora, max_steps=9, gradient_accumulation_steps=1, save_strategy="no")
    seen = []
    inner = trainer.compute_loss

    def noting(model, inputs, **options):
        seen.append([example.query.split()[2] for example in inputs["examples"]])
        return inner(model, inputs, **options)

    trainer.compute_loss = noting
    trainer.train()
    assert all(len(set(batch)) == 1 for batch in seen)
    assert {batch[0] for batch in seen} == {"number", "other"}


def test_no_corpus_fills_a_batch(tmp_path):
    corpora = {"one": rows(3), "two": rows(2, name="other")}
    with pytest.raises(ConfigError, match="a batch takes 4 queries of one corpus, the largest has 3"):
        trainer_of(tmp_path, corpora, per_device_train_batch_size=4)


# ---- the loss


def test_the_loss_is_that_of_its_vectors(tmp_path):
    trainer = trainer_of(tmp_path, ranking_temperature=0.5, augmentation_weight=0.5)
    trainer.get_train_dataloader()
    inputs = trainer._prepare_inputs([1, 2, 3])
    found = trainer.compute_loss(trainer.model, inputs)
    encoder = trainer.encoder
    texts = [[trainer.lists.texts[n] for n in own] for own in inputs["passages"].tolist()]
    answers = [example.answer or "x" for example in inputs["examples"]]
    parts = [
        torch.from_numpy(encoder.encode_queries([example.query for example in inputs["examples"]])),
        torch.stack([torch.from_numpy(encoder.encode_documents(own)) for own in texts]),
        torch.from_numpy(encoder.encode_queries(answers)),
    ]
    expected = distillation_loss(
        *parts, augmented=torch.tensor([False, True, True]), temperature=0.5, augmentation_weight=0.5, norm_weight=0.0
    )
    assert expected.augmentation.item() > 0
    assert found.item() == pytest.approx(expected.total.item(), rel=1e-4)


def test_terms_are_logged_and_fall(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=12, save_strategy="no", gradient_accumulation_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ranking"] + entry["augmentation"], abs=2e-3)
        assert entry["norm"] == 0.0, "the tiny encoder normalises"
    assert sum(e["ranking"] for e in logs[-4:]) < sum(e["ranking"] for e in logs[:4])


def test_without_augmentations_the_contrast_is_left_out(tmp_path):
    trainer = trainer_of(tmp_path, {"one": rows(answers=False)}, max_steps=1, save_strategy="no")
    trainer.train()
    assert "augmentation" not in trainer.state.log_history[0]
    trainer = trainer_of(tmp_path, max_steps=1, save_strategy="no", augmentation_weight=0.0)
    trainer.train()
    assert "augmentation" not in trainer.state.log_history[0]


def test_an_encoder_without_normalisation_has_its_norm_term(tmp_path):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(FOLDER / "encoder"), device="cpu")
    folder = tmp_path / "plain"
    SentenceTransformer(modules=list(plain)[:2], device="cpu").save_pretrained(str(folder))
    encoder = SentenceEncoder(folder, normalize=False, devices="cpu")
    args = DistillationConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, group_size=4, save_strategy="no",
        use_cpu=True, bf16=False, report_to="none", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(encoder=encoder, args=args, corpora={"one": rows()})
    trainer.train()
    assert trainer.state.log_history[0]["norm"] > 0.0


# ---- resume, what is saved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resumed_it_draws_and_ends_as_if_it_had_not_been_stopped(tmp_path, lora):
    from rag_rl.config.arguments import QueryEncoderArguments
    from rag_rl.config.parts import make_trainable

    args = QueryEncoderArguments(retriever_train="lora", retriever_lora_r=2, retriever_lora_alpha=4)
    prepare = (lambda encoder: make_trainable(encoder, args)) if lora else None
    drawn: dict[str, list] = {"whole": [], "resumed": []}

    def made(name: str) -> DistillationTrainer:
        trainer = trainer_of(tmp_path / name, prepare=prepare)
        inner = trainer.lists.draw
        trainer.lists.draw = lambda *a: drawn[name].append((*a, inner(*a))) or inner(*a)
        return trainer

    # 8 rows, 4 a step: an epoch has 2 steps, and step 3 is in the middle of the second one.
    whole = made("whole")
    whole.train()
    assert [epoch for _, epoch, _ in drawn["whole"]] == [0] * 8 + [1] * 8 + [2] * 4
    resumed = made("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 5
    assert drawn["resumed"] == drawn["whole"][12:]
    again = dict(resumed.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(again[name], weight, msg=name)


def test_both_sides_move_and_the_saved_model_is_a_plain_one(tmp_path):
    from sentence_transformers import SentenceTransformer

    trainer = trainer_of(tmp_path / "run", save_strategy="no")
    before = trainer.encoder.encode_documents(["number 1 lives in house 1."])
    trainer.train()
    after = trainer.encoder.encode_documents(["number 1 lives in house 1."])
    assert abs(after - before).max() > 1e-4
    trainer.model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain.encode(["number 1 lives in house 1."]) == pytest.approx(after, abs=1e-5)


# ---- two processes


SCRIPT = """
import sys

import torch
from test_distillation_trainer import rows, trainer_of

folder, name, size = sys.argv[1:]
corpora = {"one": rows(9), "two": rows(8, name="other", negatives=2)}
trainer = trainer_of(
    f"{folder}/{name}", corpora, per_device_train_batch_size=int(size), gradient_accumulation_steps=1, max_steps=3,
    optim="sgd", lr_scheduler_type="constant", learning_rate=0.05, max_grad_norm=0.0, save_strategy="no",
    ranking_temperature=0.1,
)
trainer.train()
if trainer.accelerator.is_main_process:
    logs = [(e["ranking"], e["augmentation"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    weights = {name: p.detach() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    torch.save({"logs": logs, "weights": weights}, f"{folder}/{name}.pt")
from rag_rl.run import end_processes

end_processes(0)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """With plain gradient descent, which shows a gradient that is off by a factor."""
    script = tmp_path / "share.py"
    script.write_text(SCRIPT)
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu_2proc.yaml"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(config)]
    for name, size, command in (("alone", 4, [sys.executable]), ("both", 2, launch)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path), name, str(size)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "both"))
    start = dict(trainer_of(tmp_path / "start").model.named_parameters())
    moved = max((one["weights"][name] - start[name]).abs().max().item() for name in start)
    apart = max((one["weights"][name] - two["weights"][name]).abs().max().item() for name in start)
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)
