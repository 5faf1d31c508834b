"""Named sets of lm-eval tasks, each task with its shots and the metric that is reported of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskChoice:
    """One task of a set.

    Attributes:
        name: lm-eval's, of a task or a group.
        shots: Examples in the prompt; None: the task's own number.
        metric: ``metric,filter`` of lm-eval's results that counts; None: all of them.
        folder: Of the package's task folder where it is defined, so that nobody has to read all
            fifteen thousand files of the others; "" where unknown.
    """

    name: str
    shots: int | None = None
    metric: str | None = None
    folder: str = ""


def _six(mmlu_shots: int) -> tuple[TaskChoice, ...]:
    return (
        TaskChoice("arc_challenge", 25, "acc_norm,none", "arc"),
        TaskChoice("truthfulqa_mc2", 0, "acc,none", "truthfulqa"),
        TaskChoice("winogrande", 5, "acc,none", "winogrande"),
        TaskChoice("gsm8k", 5, "exact_match,strict-match", "gsm8k"),
        TaskChoice("hellaswag", 10, "acc_norm,none", "hellaswag"),
        TaskChoice("mmlu", mmlu_shots, "acc,none", "mmlu"),
    )


TASK_SETS: dict[str, tuple[TaskChoice, ...]] = {"paper": _six(1), "leaderboard": _six(5)}
"""``paper``: the six of arXiv 2405.17888 with the shots of its authors' script, where MMLU has one;
``leaderboard``: the same with five, as the Open LLM Leaderboard had it. Their mean is reported."""
