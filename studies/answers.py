"""What a model answers to held-out prompts, and which of several answers a reward takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.storage.commit import write_jsonl_atomically
from studies.commands import command
from studies.lines import read_lines
from studies.material import Material

Answers = Mapping[str, Sequence[str]]  # by the key of the prompt


def generated(material: Material, hf: Path, prompts: Path, out: Path, *options: Any) -> Answers:
    """The model's answers, sampled into ``out`` if it is not there.

    Args:
        options: Of ``megatron-irl generate``, besides the material's own.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command("generate", "--model", hf, "--prompts", prompts, "--out", out,
                *material.generate, *options)
    answers: dict[str, list[str]] = {}
    for line in read_lines(out):
        answers.setdefault(material.key(line), []).append(line["response"])
    return answers


def shares(material: Material, answers: Answers) -> list[float]:
    """Share of right answers, a prompt."""
    rights = [[material.is_right(key, text) for text in texts] for key, texts in answers.items()]
    return [sum(values) / len(values) for values in rights]


def taken(material: Material, sampled: Path, judge: Path, n: int) -> Answers:
    """Of every ``n`` answers in turn the one that the reward of a run likes best.

    Args:
        sampled: Lines of ``generate``. The rewards go beside it.
        judge: Folder of a run of rft, whose reward is explicit, or of another, whose policy is
            asked against the model it began with.
    """
    asked, out = sampled.with_name("to_score.jsonl"), sampled.with_name("rewards.jsonl")
    records: dict[str, dict[str, Any]] = {}
    for line in read_lines(sampled):
        record = {"prompt": line["prompt"], "responses": []}
        records.setdefault(material.key(line), record)["responses"].append(line["response"])
    if not out.exists():
        write_jsonl_atomically(asked, records.values())
        command("score", "--model", judge, "--pairs", asked, "--out", out, *material.score)
    return {key: best_of(record["responses"], line["rewards"], n)
            for (key, record), line in zip(records.items(), read_lines(out), strict=True)}


def best_of(texts: Sequence[str], rewards: Sequence[float], n: int) -> list[str]:
    """The best of every ``n`` in turn; of equal ones the first."""
    groups = [range(i, i + n) for i in range(0, len(texts), n)]
    return [texts[max(group, key=lambda i: rewards[i])] for group in groups]
