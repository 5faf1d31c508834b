"""One point of a study: task, seed, method and settings. Kept by what it is, and resumed.

A point's folder is named by the digest of everything that shapes it, so points are shared between
studies, and a study that is stopped goes on where it was.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.cli import main as cli
from megatron_irl.storage.commit import write_file, write_jsonl_atomically
from studies.methods import recipe_of
from studies.model import make_model
from studies.tasks import TASKS, Example, make_examples

SAMPLES = 8  # of each held-out prompt, at temperature 1
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Point:
    """What to run.

    Attributes:
        task: ``name`` and the sizes that ``make_examples`` takes.
        model: ``hidden`` and ``layers``.
        start: Settings of the SFT run that all methods start from.
        method, settings: See ``methods``.
        seed: Of data, order and samples.
    """

    task: Mapping[str, Any]
    model: Mapping[str, Any]
    start: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.method}-{digest(asdict(self))}"


def digest(mapping: Mapping[str, Any]) -> str:
    """Ten hex digits of a mapping's contents."""
    text = json.dumps(mapping, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_point(point: Point, out: Path, *, split: str) -> dict[str, Any]:
    """Train if need be, sample the prompts of ``split``, and score them.

    Returns:
        ``greedy`` (0 or 1 a prompt), ``sampled`` (share of right samples a prompt), ``distinct``
        (different samples a prompt, as a share), and ``seconds`` of training.
    """
    folder = out / "points" / point.name
    result = folder / f"{split}.json"
    if result.exists():
        return json.loads(result.read_text())
    data = _data(point, out)
    start = _start(point, data, out)
    hf = start if point.method == "start" else _train(point, start, data, folder / "run")
    measured = _measure(point, hf, data / f"{split}.jsonl", folder / split)
    seconds = 0.0
    if point.method != "start":
        seconds = json.loads((folder / "seconds.json").read_text())["seconds"]
    measured["seconds"] = seconds
    write_file(result, json.dumps(measured).encode())
    return measured


def _data(point: Point, out: Path) -> Path:
    folder = out / "data" / digest({"task": point.task, "seed": point.seed})
    if not (folder / "test.jsonl").exists():
        sizes = {name: value for name, value in point.task.items() if name != "name"}
        splits = make_examples(TASKS[point.task["name"]], point.seed, **sizes)
        for split, examples in splits.items():
            write_jsonl_atomically(folder / f"{split}.jsonl", map(_record, examples))
    return folder


def _record(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt + "=", "response": example.answer,
            "is_right": example.is_right}  # for the measurement; training does not read it


def _start(point: Point, data: Path, out: Path) -> Path:
    """The model that all methods start from: a little SFT on a random one."""
    model = out / "models" / digest(point.model)
    make_model(model, **point.model)
    folder = out / "starts" / digest(
        {"task": point.task, "seed": point.seed, "model": point.model, "start": point.start}
    )
    if not point.start["steps"]:
        return model
    return _run("sft", point.start, model, data, folder, point.seed)


def _train(point: Point, start: Path, data: Path, folder: Path) -> Path:
    return _run(point.method, point.settings, start, data, folder, point.seed)


def _run(
    method: str, settings: Mapping[str, Any], start: Path, data: Path, folder: Path, seed: int
) -> Path:
    """The HF folder of a finished run; the run's own files go, but for its log."""
    done = folder.parent / "seconds.json" if folder.name == "run" else folder / "seconds.json"
    if not done.exists():
        recipe = folder.with_name(folder.name + ".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(
            recipe_of(method, settings, start=start, data=data, out=folder, seed=seed),
            sort_keys=False,
        ))
        began = time.perf_counter()
        _command("train", recipe)
        write_file(done, json.dumps({"seconds": time.perf_counter() - began}).encode())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "hf"


def _measure(point: Point, hf: Path, prompts: Path, folder: Path) -> dict[str, Any]:
    is_right = TASKS[point.task["name"]].is_right
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, options in (
        ("greedy", ("--temperature", 0)),
        ("sampled", ("--num-samples", SAMPLES, "--seed", point.seed)),
    ):
        out = folder / f"{name}.jsonl"
        if not out.exists():
            _command("generate", "--model", hf, "--prompts", prompts, "--out", out,
                     "--max-new-tokens", 12, *options)
        answers: dict[str, list[str]] = {}
        for line in map(json.loads, out.read_text().splitlines()):
            answers.setdefault(line["prompt"].removesuffix("="), []).append(line["response"])
        rights = {p: [is_right(p, a) for a in texts] for p, texts in answers.items()}
        found[name] = [sum(values) / len(values) for values in rights.values()]
        if name == "sampled":
            found["distinct"] = [len(set(texts)) / len(texts) for texts in answers.values()]
    return found


def _command(*arguments: Any) -> None:
    """Run a command of the product in this process; stop with its exit code if it fails."""
    code = cli([str(argument) for argument in arguments])
    if code:
        sys.exit(code)
