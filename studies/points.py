"""One point of a study: task, seed, method and settings. Kept by what it is, and resumed.

A point's folder is named by the digest of everything that shapes it, so points are shared between
studies, and a study that is stopped goes on where it was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_irl.storage.commit import write_file, write_jsonl_atomically
from studies.answers import generated, shares, taken
from studies.commands import command, logged
from studies.lines import read_lines
from studies.material import material_of
from studies.methods import recipe_of
from studies.model import make_model, pretrained
from studies.rewards import reward_auc

REWARDED = ("spin", "irft", "rft")  # methods that learn a reward
MEASURING = ("temperature",)  # settings that change what is sampled, and not what is trained


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

    @property
    def trained(self) -> "list[Point]":
        """Whose runs it measures: its own, as a rule; of ``best_of`` what draws and what judges."""
        if self.method == "start":
            return []
        if self.method == "best_of":
            return [self.part("draws"), self.part("judge")]
        kept = {k: v for k, v in self.settings.items() if k not in MEASURING}
        return [replace(self, settings=kept)]

    @property
    def needs(self) -> "list[Point]":
        """Points that are trained before it, since others measure or use their runs as well."""
        shared = [part for part in self.trained if part != self]
        has_reward = self.method == "filtered" and "kind" in self.settings["reward"]
        return [*shared, self.part("reward")] if has_reward else shared

    def part(self, key: str) -> "Point":
        """The point that a setting describes: a method's settings with its ``kind``."""
        settings = dict(self.settings[key])
        return replace(self, method=settings.pop("kind"), settings=settings)


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


def train_point(point: Point, out: Path, home: Path | None = None) -> Path:
    """Train it if need be; returns the HF folder of the result.

    Args:
        point: One that trains itself.
        home: Where its run goes; none: the point's folder.
    """
    folder = home or out / "points" / point.name
    with logged(folder / "log.txt"):
        data = _data(point, out)
        start = _start(point, data, out)
        return _train(point, start, _demonstrations(point, start, data, out), folder, out)


def answers(point: Point, out: Path) -> dict[str, str]:
    """The greedy answers of a point that has been measured on the test split, by prompt."""
    key = material_of(point.task["name"]).key
    lines = read_lines(out / "points" / point.name / "test" / "greedy.jsonl")
    return {key(line): line["response"] for line in lines}


def _run_and_measure(point: Point, out: Path, folder: Path, split: str) -> dict[str, Any]:
    data = _data(point, out)
    start = _start(point, data, out)
    demonstrations = _demonstrations(point, start, data, out)
    prompts = data / f"{split}.jsonl"
    if point.method == "start":
        return _measure(point, start, prompts, folder / split) | {"seconds": 0.0}
    homes = [out / "points" / part.name for part in point.trained]
    hf, *_ = [_train(part, start, demonstrations, home, out)
              for part, home in zip(point.trained, homes, strict=True)]
    judge = homes[-1] / "run" if point.method == "best_of" else None
    measured = _measure(point, hf, prompts, folder / split, judge)
    measured["seconds"] = sum(
        json.loads((home / "seconds.json").read_text())["seconds"] for home in homes)
    if point.method in REWARDED and split == "test":  # no setting is chosen by it
        measured["auc"] = reward_auc(homes[0] / "run", start, demonstrations, homes[0],
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
            read_lines(data / "train.jsonl"), read_lines(drafts), point.task, point.seed))
    return mixed


def _train(point: Point, start: Path, demonstrations: Path, folder: Path, out: Path) -> Path:
    """The HF folder of the method's result; ``filtered`` is sft on what a reward of rft prefers."""
    if point.method != "filtered":
        return _run(point.method, point.settings, start, demonstrations, folder / "run", point)
    kept = folder / "kept.jsonl"
    if not kept.exists():
        if point.needs:
            home = out / "points" / point.needs[0].name
            _train(point.needs[0], start, demonstrations, home, out)
            reward = home / "run"
        else:
            reward = folder / "reward"
            _run("rft", point.settings["reward"], start, demonstrations, reward, point)
        command("filter", reward, "--out", kept, "--top-quantile", point.settings["keep"])
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
        began, worked = time.perf_counter(), time.process_time()
        command("train", path)
        write_file(done, json.dumps({
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - worked}).encode())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "hf"


def _measure(
    point: Point, hf: Path, prompts: Path, folder: Path, judge: Path | None = None
) -> dict[str, Any]:
    """Greedy answers and samples of ``hf``; ``judge`` is the run whose reward takes the samples."""
    material = material_of(point.task["name"])
    greedy = generated(material, hf, prompts, folder / "greedy.jsonl", "--temperature", 0)
    n = point.settings["n"] if judge else 1
    sampled = generated(
        material, hf, prompts, folder / "sampled.jsonl", "--num-samples", material.samples * n,
        "--seed", point.seed, "--temperature", point.settings.get("temperature", 1.0))
    if judge:
        sampled = taken(material, folder / "sampled.jsonl", judge, n)
    return {
        "greedy": shares(material, greedy), "sampled": shares(material, sampled),
        "distinct": [len(set(texts)) / len(texts) for texts in sampled.values()],
    }
