"""One point of a study: task, seed, method and settings. Kept by what it is, and resumed.

A point's folder is named by the digest of everything that shapes it, so points are shared between
studies, and a study that is stopped goes on where it was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.storage.commit import write_file, write_jsonl_atomically
from studies.commands import command, logged
from studies.material import material_of
from studies.methods import recipe_of
from studies.model import make_model, pretrained
from studies.rewards import reward_auc

REWARDED = ("irft", "rft")  # methods that learn a reward


@dataclass(frozen=True)
class Point:
    """What to run.

    Attributes:
        task: ``name`` and the sizes that ``make_examples`` takes; ``unedited``, the share of the
            demonstrations whose answers are the starting model's own samples, as they were.
        model: ``hidden`` and ``layers``, or ``hf``, the folder of a pretrained one.
        start: Settings of the SFT run that all methods start from, on the demonstrations, or on
            ``before`` other examples, of which the share ``habit`` is answered by habit, of
            ``lengths``.
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
        (different samples a prompt, as a share), ``seconds`` of training, and in a test
        ``auc`` of the reward over the demonstrations where there is one; see ``reward_auc``.
    """
    folder = out / "points" / point.name
    result = folder / f"{split}.json"
    if result.exists():
        return json.loads(result.read_text())
    with logged(folder / "log.txt"):
        measured = _run_and_measure(point, out, folder, split)
    write_file(result, json.dumps(measured).encode())
    return measured


def answers(point: Point, out: Path) -> dict[str, str]:
    """The greedy answers of a point that has been measured on the test split, by prompt."""
    key = material_of(point.task["name"]).key
    lines = _lines(out / "points" / point.name / "test" / "greedy.jsonl")
    return {key(line): line["response"] for line in lines}


def _run_and_measure(point: Point, out: Path, folder: Path, split: str) -> dict[str, Any]:
    data = _data(point, out)
    start = _start(point, data, out)
    demonstrations = _demonstrations(point, start, data, out)
    prompts = data / f"{split}.jsonl"
    if point.method == "start":
        return _measure(point, start, prompts, folder / split) | {"seconds": 0.0}
    hf = _train(point, start, demonstrations, folder)
    measured = _measure(point, hf, prompts, folder / split)
    measured["seconds"] = json.loads((folder / "seconds.json").read_text())["seconds"]
    if point.method in REWARDED and split == "test":  # no setting is chosen by it
        measured["auc"] = reward_auc(folder / "run", start, demonstrations, folder,
                                     material_of(point.task["name"]).score)
    return measured


def _data(point: Point, out: Path) -> Path:
    sizes = {name: value for name, value in point.task.items() if name not in ("name", "unedited")}
    own = ("before", "habit", "lengths")
    sizes |= {name: point.start[name] for name in own if name in point.start}
    folder = out / "data" / digest({"task": {"name": point.task["name"]} | sizes,
                                    "seed": point.seed})
    if not (folder / "test.jsonl").exists():
        splits = material_of(point.task["name"]).splits(point.seed, sizes)
        for split in sorted(splits, key="test".__eq__):  # test last: it says that all are there
            write_jsonl_atomically(folder / f"{split}.jsonl", splits[split])
    return folder


def _start(point: Point, data: Path, out: Path) -> Path:
    """The model that all methods start from: a pretrained one, or a little SFT on a random one."""
    if "hf" in point.model:
        return pretrained(point.model["hf"])
    model = out / "models" / digest(point.model)
    make_model(model, **point.model)
    own = "before" in point.start
    folder = out / "starts" / digest(
        {"task": point.task["name"] if own else point.task, "seed": point.seed,
         "model": point.model, "start": point.start})
    if not point.start["steps"]:
        return model
    demonstrations = data / ("before.jsonl" if own else "train.jsonl")
    return _run("sft", point.start, model, demonstrations, folder, point)


def _demonstrations(point: Point, start: Path, data: Path, out: Path) -> Path:
    """The file of demonstrations; those that nobody edited are samples of ``start``."""
    material = material_of(point.task["name"])
    if not material.needs_drafts(point.task):
        return data / "train.jsonl"
    made_by = point.model["hf"] if "hf" in point.model else start.parent.name
    folder = out / "data" / digest({"start": made_by, "task": point.task, "seed": point.seed})
    drafts, mixed = folder / "drafts.jsonl", folder / "train.jsonl"
    if not mixed.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command("generate", "--model", start, "--prompts", data / "train.jsonl", "--out", drafts,
                *material.generate, "--seed", point.seed)
        write_jsonl_atomically(mixed, material.demonstrations(
            _lines(data / "train.jsonl"), _lines(drafts), point.task, point.seed))
    return mixed


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train(point: Point, start: Path, demonstrations: Path, folder: Path) -> Path:
    """The HF folder of the method's result; ``filtered`` is sft on what a reward of rft prefers."""
    if point.method != "filtered":
        return _run(point.method, point.settings, start, demonstrations, folder / "run", point)
    kept = folder / "kept.jsonl"
    if not kept.exists():
        _run("rft", point.settings["reward"], start, demonstrations, folder / "reward", point)
        command("filter", folder / "reward", "--out", kept, "--top-quantile",
                point.settings["keep"])
    return _run("sft", point.settings, start, kept, folder / "run", point)


def _run(
    method: str, settings: Mapping[str, Any], start: Path, demonstrations: Path, folder: Path,
    point: Point,
) -> Path:
    """The HF folder of a finished run; the run's own files go, but for its log."""
    done = folder.parent / "seconds.json" if folder.name == "run" else folder / "seconds.json"
    if not done.exists():
        recipe = recipe_of(method, settings, start=start, demonstrations=demonstrations,
                           out=folder, seed=point.seed)
        for key, value in material_of(point.task["name"]).recipe.items():
            recipe[key] = recipe[key] | value if isinstance(value, Mapping) else value
        path = folder.with_name(folder.name + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        began = time.perf_counter()
        command("train", path)
        write_file(done, json.dumps({"seconds": time.perf_counter() - began}).encode())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "hf"


def _measure(point: Point, hf: Path, prompts: Path, folder: Path) -> dict[str, Any]:
    material = material_of(point.task["name"])
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, options in (
        ("greedy", ("--temperature", 0)),
        ("sampled", ("--num-samples", material.samples, "--seed", point.seed,
                     "--temperature", point.settings.get("temperature", 1.0))),
    ):
        out = folder / f"{name}.jsonl"
        if not out.exists():
            command("generate", "--model", hf, "--prompts", prompts, "--out", out,
                    *material.generate, *options)
        answers: dict[str, list[str]] = {}
        for line in _lines(out):
            answers.setdefault(material.key(line), []).append(line["response"])
        rights = {p: [material.is_right(p, a) for a in texts] for p, texts in answers.items()}
        found[name] = [sum(values) / len(values) for values in rights.values()]
        if name == "sampled":
            found["distinct"] = [len(set(texts)) / len(texts) for texts in answers.values()]
    return found
