"""The pairwise margin loss against plain loops, and through a real cross-encoder."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor

from rag_rl.errors import ConfigError
from rag_rl.tiny import FOLDER
from rag_rl.trainers.pairwise_margin import PairwiseMarginLoss, pairwise_margin, ranking_loss

QUERIES = ["Where does Gilpabert live?", "What is Waltaham known for?"]
DOCUMENTS = [
    ["Gilpabert lives in Walpawick.", "The home of Gilpabert is Walpawick.", "Waltaham is known for cheese.", "Tom."],
    ["Waltaham is known for cheese.", "Gilpabert is by craft a painter."],
]
LABELS = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0])]


@pytest.fixture(scope="module")
def model() -> CrossEncoder:
    torch.manual_seed(0)
    return CrossEncoder(str(FOLDER / "encoder"), num_labels=1, device="cpu")


def by_loops(scores: Tensor, labels: Tensor, queries: Tensor, margin: float) -> Tensor:
    terms = [
        torch.clamp(margin - (scores[i] - scores[j]), min=0)
        for i in range(len(scores))
        for j in range(len(scores))
        if queries[i] == queries[j] and labels[i] > 0 and not labels[j] > 0
    ]
    return torch.stack(terms).mean() if terms else scores.sum() * 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("margin", [0.1, 1.0, 3.0])
def test_value_and_gradient_are_those_of_loops(seed, margin):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(23, generator=generator, dtype=torch.float64)
    labels = (torch.rand(23, generator=generator) < 0.3).double()
    queries = torch.randint(0, 5, (23,), generator=generator)
    ours, theirs = (scores.clone().requires_grad_() for _ in range(2))
    found = pairwise_margin(ours, labels, queries, margin=margin)
    expected = by_loops(theirs, labels, queries, margin)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_worked_by_hand():
    # Pairs: 2 - 1.5 leads by 0.5, 0.5 - 1.5 by -1; the document of the other query is compared with nothing.
    found = pairwise_margin(
        torch.tensor([2.0, 0.5, 1.5, 9.0]), torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 0, 1]), margin=1.0
    )
    assert found.item() == 1.25


def test_a_lead_of_the_margin_costs_nothing_and_moves_nothing():
    scores = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = pairwise_margin(scores, torch.tensor([1, 0]), torch.tensor([0, 0]), margin=2.0)
    loss.backward()
    assert (loss.item(), scores.grad.tolist()) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("labels", [[1, 1], [0, 0]])
def test_without_a_pair_there_is_nothing_to_learn(labels):
    scores = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = pairwise_margin(scores, torch.tensor(labels), torch.tensor([0, 0]), margin=1.0)
    loss.backward()
    assert (loss.item(), scores.grad.tolist()) == (0.0, [0.0, 0.0])


def test_half_precision_is_raised():
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    loss = pairwise_margin(scores, torch.tensor([1, 0]), torch.tensor([0, 0]), margin=1.0)
    loss.backward()
    assert (loss.dtype, loss.item(), scores.grad.dtype) == (torch.float32, 2.0, torch.bfloat16)


# ---- through a cross-encoder


@pytest.mark.parametrize("mini_batch_size", [None, 1, 4, 100])
def test_the_loss_compares_the_models_logits(model, mini_batch_size):
    model.eval()
    with torch.no_grad():
        scores = [
            torch.tensor(model.predict([(q, d) for d in listed], activation_fn=torch.nn.Identity()))
            for q, listed in zip(QUERIES, DOCUMENTS, strict=True)
        ]
        expected = by_loops(torch.cat(scores), torch.cat(LABELS), torch.tensor([0, 0, 0, 0, 1, 1]), 1.0)
        loss = PairwiseMarginLoss(model, mini_batch_size=mini_batch_size)([QUERIES, DOCUMENTS], LABELS)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradients_reach_body_and_head(model):
    model.zero_grad()
    PairwiseMarginLoss(model, margin=5.0)([QUERIES, DOCUMENTS], LABELS).backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # The bias of the last layer is the same for all scores, and cancels.
    assert [name.rsplit(".", 2)[-2:] for name in lacking] in ([["classifier", "bias"]], [])


@pytest.mark.parametrize("name", ["ranknet", "listnet", "lambda"])
def test_the_others_are_those_of_sentence_transformers(model, name):
    from sentence_transformers.cross_encoder import losses

    kind = {"ranknet": losses.RankNetLoss, "listnet": losses.ListNetLoss, "lambda": losses.LambdaLoss}[name]
    model.eval()
    with torch.no_grad():
        ours = ranking_loss(name, model)([QUERIES, DOCUMENTS], LABELS)
        theirs = kind(model)([QUERIES, DOCUMENTS], LABELS)
        small = ranking_loss(name, model, mini_batch_size=1)([QUERIES, DOCUMENTS], LABELS)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert small.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert ours.item() > 0


def test_ranknet_is_the_mean_logistic_loss_in_bits(model):
    model.eval()
    with torch.no_grad():
        loss = ranking_loss("ranknet", model)([QUERIES[1:], DOCUMENTS[1:]], LABELS[1:])
        high, low = model.predict([(QUERIES[1], d) for d in DOCUMENTS[1]], activation_fn=torch.nn.Identity())
    expected = torch.nn.functional.softplus(torch.tensor(low - high)) / torch.log(torch.tensor(2.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_settings_stand_in_the_model_card(model):
    assert ranking_loss("margin", model, margin=2.0).get_config_dict() == {"margin": 2.0, "mini_batch_size": None}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 0.0}, "margin must be above 0, got 0.0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
    ],
)
def test_numbers_that_mean_nothing(model, options, expected):
    with pytest.raises(ConfigError, match=expected):
        PairwiseMarginLoss(model, **options)


def test_a_model_with_two_outputs_and_a_loss_that_nobody_knows(model):
    with pytest.raises(ConfigError, match="loss must be margin, ranknet or listnet or lambda, got 'hinge'"):
        ranking_loss("hinge", model)
    two = CrossEncoder(str(FOLDER / "encoder"), num_labels=2, device="cpu")
    for name in ("margin", "ranknet"):
        with pytest.raises(ConfigError, match="one output, this model has 2"):
            ranking_loss(name, two)


def test_labels_that_do_not_fit(model):
    with pytest.raises(ValueError, match="query 'Where does Gilpabert live\\?' has 4 documents and 1 labels"):
        PairwiseMarginLoss(model)([QUERIES[:1], DOCUMENTS[:1]], [torch.tensor([1.0])])
