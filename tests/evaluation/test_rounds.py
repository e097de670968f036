"""What a run in rounds shows."""

from __future__ import annotations

from rag_rl.evaluation.rounds import joined_history, rounds_section


def told(before: float, after: float, *, kept: bool, decides: bool = True) -> dict:
    gate = {"before": before, "after": after, "ci95": [-0.01, 0.1], "queries": 1100, "decides": decides}
    return {"kept": kept, "gate": gate}


def test_a_row_for_each_step():
    rounds = [
        {
            "round": 1,
            "queries": {"usable": 5100, "learnt": 4000, "held_out": 1100},
            "augmenter": told(0.4, 0.45, kept=True),
            "retriever": told(0.45, 0.44, kept=False),
        }
    ]
    page = rounds_section(rounds, metric="ndcg@10")
    assert page.count("<tr>") == 3
    assert '<a href="round_1/augmenter/report.html">round_1/augmenter</a></th><td>4,000</td><td>1,100</td>' in page
    assert "<td>0.400</td><td>0.450</td><td>+0.050 [-0.010, +0.100]</td><td>yes</td>" in page
    assert "<td>0.450</td><td>0.440</td><td>-0.010 [-0.010, +0.100]</td><td>no</td>" in page
    assert "is not kept" in page


def test_without_a_gate_it_says_so():
    one = told(0.4, 0.3, kept=True, decides=False)
    rounds = [{"round": 1, "queries": {"learnt": 1}, "augmenter": one, "retriever": one}]
    assert "The gate is off: every step is kept." in rounds_section(rounds, metric="ndcg@10")


def test_logs_follow_each_other():
    augmenter = [
        {"step": 5, "loss": 0.7, "rewards/margins": 0.1, "learning_rate": 1e-3},
        {"step": 10, "loss": 0.6, "rewards/margins": 0.2},
        {"step": 12, "train_runtime": 3.0},
    ]
    assert joined_history(
        [("augmenter", augmenter), ("retriever", [{"step": 5, "loss": 2.0}]), ("augmenter", [])]
    ) == [
        {"step": 5, "augmenter/loss": 0.7, "augmenter/rewards/margins": 0.1},
        {"step": 10, "augmenter/loss": 0.6, "augmenter/rewards/margins": 0.2},
        {"step": 17, "retriever/loss": 2.0},
    ]
