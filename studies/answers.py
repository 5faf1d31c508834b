"""What a model answers to held-out prompts, and which of several answers a reward takes."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.storage.commit import write_jsonl_atomically
from studies.commands import command

SAMPLES = 8  # of each held-out prompt, at temperature 1 unless a method says otherwise
Answers = Mapping[str, Sequence[str]]  # by prompt


def generated(
    hf: Path, prompts: Path, out: Path, *, temperature: float, samples: int = 1,
    seed: int | None = None,
) -> Answers:
    """The model's answers, sampled into ``out`` if it is not there."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        options: list[Any] = ["--temperature", temperature]
        if samples > 1:
            options += ["--num-samples", samples]
        if seed is not None:
            options += ["--seed", seed]
        command("generate", "--model", hf, "--prompts", prompts, "--out", out,
                "--max-new-tokens", 12, *options)
    answers: dict[str, list[str]] = {}
    for line in map(json.loads, out.read_text().splitlines()):
        answers.setdefault(line["prompt"].removesuffix("="), []).append(line["response"])
    return answers


def shares(answers: Answers, is_right: Callable[[str, str], bool]) -> list[float]:
    """Share of right answers, a prompt."""
    rights = [[is_right(prompt, text) for text in texts] for prompt, texts in answers.items()]
    return [sum(values) / len(values) for values in rights]


def taken(answers: Answers, judge: Path, folder: Path, n: int) -> Answers:
    """Of every ``n`` answers in turn the one that the reward of a run likes best.

    Args:
        judge: Folder of a run of rft, whose reward is explicit, or of another, whose policy is
            asked against the model it began with.
        folder: Where the rewards go.
    """
    out = folder / "rewards.jsonl"
    if not out.exists():
        asked = folder / "to_score.jsonl"
        write_jsonl_atomically(asked, (
            {"prompt": prompt + "=", "responses": list(texts)}
            for prompt, texts in answers.items()))
        command("score", "--model", judge, "--pairs", asked, "--out", out)
    rewards = [json.loads(line)["rewards"] for line in out.read_text().splitlines()]
    return {prompt: best_of(texts, row, n)
            for (prompt, texts), row in zip(answers.items(), rewards, strict=True)}


def best_of(texts: Sequence[str], rewards: Sequence[float], n: int) -> list[str]:
    """The best of every ``n`` in turn; of equal ones the first."""
    groups = [range(i, i + n) for i in range(0, len(texts), n)]
    return [texts[max(group, key=lambda i: rewards[i])] for group in groups]
