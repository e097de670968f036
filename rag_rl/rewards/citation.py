"""Reward for citing the passages that hold the answer."""

from __future__ import annotations

from typing import Any

from rag_rl.rewards.columns import asks_yes_or_no, final_answers, gold_and_shown, passages_with_answer, text_lists
from rag_rl.text import ANSWER_MARKER, cited_numbers, completion_text, split_thinking
from rag_rl.types import Reward


def citation_reward(*, answer_marker: str = ANSWER_MARKER) -> Reward:
    """Makes the citation reward: the smaller of precision and recall of the passages cited as ``[i]``.

    Right are the passages of gold documents where the dataset names them (columns ``gold_doc_ids`` and
    ``passage_ids``), and then each gold document shown must be cited. Elsewhere the passages that contain an accepted
    answer are right, and one of them is enough: any further citation costs, so that citing all never beats citing one.
    Numbers of passages that do not exist count as wrong; a citation made twice counts once.

    Citations count anywhere outside the thinking part. On the answer line they would make an exact match fail unless
    the answer reward is made with ``without_citations=True``.

    Args:
        answer_marker: what precedes the answer; a completion without an answer gets 0.0, whatever it cites.

    Returns:
        A reward with values in [0, 1]; None in all rows of a question where no shown passage is known to be right.
    """

    def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        rows = len(completions)
        passages = text_lists("passages", columns, rows=rows, reward="citation")
        golds = text_lists("answers", columns, rows=rows, reward="citation")
        gold_ids, shown_ids = gold_and_shown(columns, rows=rows, reward="citation")
        answers = final_answers(completions, marker=answer_marker, without_citations=True)
        scores: list[float | None] = []
        for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            # Passage number -> what citing it shows: its gold document, or just "an answer", of which one is enough.
            if gold_ids[row] and shown_ids is not None:
                right = {i: doc for i, doc in enumerate(shown_ids[row], start=1) if doc in gold_ids[row]}
            elif asks_yes_or_no(golds[row]):
                right = {}
            else:
                right = dict.fromkeys(passages_with_answer(passages[row], golds[row]), "an answer")
            if not right:
                scores.append(None)
                continue
            cited = (
                cited_numbers(split_thinking(completion_text(completion))[1] or "") if answer is not None else set()
            )
            shown_right = {right[number] for number in cited if number in right}
            scores.append(len(shown_right) / max(len(cited), len(set(right.values()))))
        return scores

    reward.__name__ = "citation"
    return reward
