"""What a model can do when it may try several times: the headroom that reinforcement has at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.reasoning import ReasoningAssembly
from rag_rl.metrics import exact_match
from rag_rl.types import Question


def pass_at_k(samples_correct: Sequence[Sequence[bool]]) -> float:
    """Share of questions that at least one of their k samples answers.

    The plain share over exactly k samples; Chen et al. 2021 (arXiv 2107.03374) estimate it without bias from more.

    Args:
        samples_correct: for each of B questions, whether each of its k samples is right.

    Returns:
        A value in [0, 1].

    Raises:
        DataError: there is no question, or one has no sample.

    Example:
        >>> pass_at_k([[False, True], [False, False]])
        0.5
    """
    if not samples_correct or not all(samples_correct):
        raise DataError("pass@k needs at least one question and one sample of each")
    return sum(any(samples) for samples in samples_correct) / len(samples_correct)


def sample_statistics(
    assembly: Assembly | ReasoningAssembly,
    questions: Sequence[Question],
    *,
    n: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Samples answers and tells how much room there is for reinforcement.

    A group whose samples are all right or all wrong has no variance, so that GRPO (arXiv 2402.03300, section 4.1)
    learns nothing from it. A question of which a sample failed is left out.

    Args:
        assembly: with a generator.
        questions: with answers.
        n: samples a question, the size of a group.
        temperature: above 0.
        seed: of the sampling.

    Returns:
        ``pass@n``, ``mean@n`` (``n`` in figures) and ``zero_variance_groups``, each in [0, 1], by exact match.

    Raises:
        ConfigError: ``n`` below 1, ``temperature`` not above 0, or an assembly without a generator.
        DataError: there is no question.
        BackendError: a sample of every question failed.
    """
    if n < 1:
        raise ConfigError(f"samples a question must be at least 1, got {n}")
    if temperature <= 0:
        raise ConfigError(f"temperature must be above 0 to sample, got {temperature}: greedy answers are all alike")
    if not questions:
        raise DataError("there is no question to sample answers for")
    groups = assembly.answer(questions, temperature=temperature, n=n, seed=seed)
    failures = [sample.failure for samples in groups for sample in samples if sample.failure is not None]
    correct = [
        [exact_match(sample.answer, question.answers) == 1.0 for sample in samples]
        for question, samples in zip(questions, groups, strict=True)
        if all(sample.failure is None for sample in samples)
    ]
    if not correct:
        raise BackendError(f"a sample of each of the {len(groups)} questions failed, the first: {failures[0]}")
    return {
        f"pass@{n}": pass_at_k(correct),
        f"mean@{n}": sum(map(sum, correct)) / (n * len(correct)),
        "zero_variance_groups": sum(len(set(samples)) == 1 for samples in correct) / len(correct),
    }
