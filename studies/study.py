"""A study from its file: trials on the validation split, then one look at the test split."""

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_file
from studies.points import Point, run_point, train_point
from studies.why import training_signs

KEYS = {"name", "hypothesis", "task", "model", "start", "common", "methods", "metric", "seeds",
        "trial_seed", "vary"}


@dataclass(frozen=True)
class Method:
    """A method of a study: its fixed settings, and values to choose among."""

    name: str
    kind: str
    fixed: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]

    def trials(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values, with the fixed settings."""
        combinations = itertools.product(*self.grid.values())
        return [dict(self.fixed) | dict(zip(self.grid, values, strict=True))
                for values in combinations]


@dataclass(frozen=True)
class Study:
    """A study's file, read; ``levels`` are the values of what it varies, with the changed task."""

    name: str
    hypothesis: str
    metric: str
    methods: Sequence[Method]
    seeds: Sequence[int]
    trial_seed: int
    levels: Mapping[str, dict[str, Any]]

    def point(self, level: str, method: Method, settings: Mapping[str, Any], seed: int) -> Point:
        """The point of a method with its settings."""
        sections = self.levels[level]
        return Point(sections["task"], sections["model"], sections["start"], method.kind,
                     settings, seed)


def read_study(path: Path) -> Study:
    """Parse a study; unknown keys are refused."""
    raw = yaml.safe_load(path.read_text())
    if unknown := set(raw) - KEYS:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}; known are {sorted(KEYS)}.")
    methods = []
    for name, entry in raw["methods"].items():
        grid = entry.get("grid", {})
        fixed = {k: v for k, v in entry.items() if k not in ("kind", "grid")}
        methods.append(Method(name, entry.get("kind", name), raw.get("common", {}) | fixed, grid))
    counts = {m.name: len(m.trials()) for m in methods if m.grid}
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: methods must have equally many trials, these have {counts}.")
    base = {key: raw[key] for key in ("task", "model", "start")}
    levels = {"": base}
    for section, keys in raw.get("vary", {}).items():
        (key, values), = keys.items()
        levels = {f"{key}={value}": base | {section: base[section] | {key: value}}
                  for value in values}
    return Study(raw["name"], raw["hypothesis"], raw.get("metric", "sampled"), methods,
                 raw["seeds"], raw["trial_seed"], levels)


def run_study(study: Study, out: Path, jobs: int) -> dict[str, Any]:
    """Trials, choice, test; returns and keeps the results, level by level and method by method."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    trials = [(level, method, settings) for level in study.levels for method in study.methods
              for settings in method.trials()]
    many = [(level, method, settings) for level, method, settings in trials if method.grid]
    scored = _run_all([(study.point(level, method, settings, study.trial_seed), "validation")
                       for level, method, settings in many], out, jobs)
    best: dict[tuple[str, str], float] = {}
    for (level, method, settings), measured in zip(many, scored, strict=True):
        score = float(np.mean(measured[study.metric]))
        if score > best.get((level, method.name), -1.0):
            best[level, method.name], chosen[level, method.name] = score, settings
    for level, method, settings in trials:
        chosen.setdefault((level, method.name), settings)
    wanted = [(level, method, seed) for level in study.levels for method in study.methods
              for seed in study.seeds]
    tested = _run_all([(study.point(level, method, chosen[level, method.name], seed), "test")
                       for level, method, seed in wanted], out, jobs)
    results: dict[str, Any] = {"name": study.name, "hypothesis": study.hypothesis,
                               "metric": study.metric, "levels": {}}
    for (level, method, seed), measured in zip(wanted, tested, strict=True):
        settings = chosen[level, method.name]
        point = study.point(level, method, settings, seed)
        folder = out / "points" / (point.trained or [point])[0].name
        entry = results["levels"].setdefault(level, {}).setdefault(method.name, {
            "settings": settings, "trials": len(method.trials()),
            "validation": best.get((level, method.name)), "seeds": []})
        entry["seeds"].append(measured | {"signs": training_signs(folder)})
    write_file(out / f"{study.name}.json", json.dumps(results).encode())
    return results


def _run_all(points: Sequence[tuple[Point, str]], out: Path, jobs: int) -> list[dict[str, Any]]:
    """Run points, ``jobs`` at a time; results in order. Starts are made before what needs them."""
    tell = Progress(len(points))
    if jobs == 1:
        return [tell(point, run_point(point, out, split=split)) for point, split in points]
    with ProcessPoolExecutor(jobs) as pool:
        for first in starts_of(points):  # no two of a stage write the same folder
            for future in [pool.submit(run_point, p, out, split=s) for p, s in first]:
                future.result()
        for future in [pool.submit(train_point, p, out) for p in shared_trainings(points)]:
            future.result()
        futures = {pool.submit(run_point, p, out, split=s): p for p, s in points}
        for future in as_completed(futures):
            tell(futures[future], future.result())
        return [future.result() for future in futures]


class Progress:
    """A line on stderr for every point that is done."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()

    def __call__(self, point: Point, measured: dict[str, Any]) -> dict[str, Any]:
        """Say what was found; returns it."""
        self._done += 1
        passed = time.monotonic() - self._start
        left = passed / self._done * (self._total - self._done)
        print(f"[{self._done}/{self._total}] {point.method} seed {point.seed}: "
              f"greedy {100 * np.mean(measured['greedy']):.1f} %, "
              f"samples {100 * np.mean(measured['sampled']):.1f} % right; "
              f"{left / 60:.0f} min left", file=sys.stderr, flush=True)
        return measured


def shared_trainings(points: Sequence[tuple[Point, str]]) -> list[Point]:
    """What is trained for other points than itself: before them, so that no two do it at once."""
    return list({part.name: part for point, _ in points for part in point.needs}.values())


def starts_of(points: Sequence[tuple[Point, str]]) -> list[list[tuple[Point, str]]]:
    """What must be there before the points: models to start from, then drafts made by them."""
    drafts = {repr((p.task, p.model, p.start, p.seed)): (_only_start(p), split)
              for p, split in points}
    models = {repr((p.task["name"] if "before" in p.start else p.task, p.model, p.start, p.seed)):
              (p, split) for p, split in drafts.values()}
    return [list(models.values()), list(drafts.values())]


def _only_start(point: Point) -> Point:
    return Point(point.task, point.model, point.start, "start", {}, point.seed)
