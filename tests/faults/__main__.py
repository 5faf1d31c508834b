"""Kill runs at random and see that nothing is lost: ``python -m tests.faults --out faults.jsonl``.

Every line of the file is a story: a run, what it was hit with, and what was wrong. Started again
with the same file, it goes on with the stories that are missing, until there are as many faults as
asked for. The table is of all lines; the exit code is 1 if anything was wrong.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.cases import CASES, write_inputs
from tests.faults.story import Reference, make_reference, tell_story


def main() -> int:
    options = parse()
    lines = read(options.out)
    wanted = {"kill": options.kills, "term": options.terms}
    root = Path(tempfile.mkdtemp(prefix="faults_", dir=options.scratch))
    try:
        write_inputs(root)
        with ThreadPoolExecutor(options.jobs) as workers:
            references = dict(zip(options.cases, workers.map(
                lambda case: make_reference(case, root), options.cases), strict=True))
            lock = threading.Lock()
            turns = [workers.submit(turn, options, wanted, lines, references, root, lock)
                     for _ in range(options.jobs)]
            for each in turns:
                each.result()
    finally:
        if options.keep:
            sys.stdout.write(f"kept {root}\n")
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.stdout.write(table(lines) + "\n")
    return int(any(line["wrong"] for line in lines))


def turn(
    options: argparse.Namespace, wanted: dict[str, int], lines: list[dict[str, Any]],
    references: dict[str, Reference], root: Path, lock: threading.Lock,
) -> None:
    """Tell stories until there are enough; of several threads each takes the next one."""
    while True:
        with lock:
            story = next_story(options, wanted, lines)
            if story is None:
                return
            lines.append(story)  # a place, so that nobody takes it too
        told = tell_story(story["case"], root, references[story["case"]], kind=story["kind"],
                          seed=story["seed"], num_faults=options.faults)
        with lock:
            story |= told.to_dict()
            story.pop("is_open")
            with open(options.out, "a") as file:
                file.write(json.dumps(story) + "\n")
            said = "; ".join(told.wrong) or "same"
            sys.stdout.write(f"{told.case} {told.kind} seed {told.seed}: {len(told.faults)} faults "
                             f"in {told.seconds:.0f} s, {said}\n")
            sys.stdout.flush()
            if not told.wrong and not options.keep:
                shutil.rmtree(root / f"{told.case}_{told.kind}_{told.seed}", ignore_errors=True)


def next_story(
    options: argparse.Namespace, wanted: dict[str, int], lines: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The first case and seed that nobody has told, of the kind that lacks most."""
    lack = {kind: number - sum(count(line, options.faults) for line in lines
                               if line["kind"] == kind) for kind, number in wanted.items()}
    kind = max(lack, key=lambda k: lack[k])
    if lack[kind] <= 0:
        return None
    told = {(line["case"], line["seed"]) for line in lines if line["kind"] == kind}
    seed = options.seed
    while True:
        for case in options.cases:
            if (case, seed) not in told:
                return {"case": case, "seed": seed, "kind": kind, "faults": [], "wrong": [],
                        "is_open": True}
        seed += 1


def count(line: dict[str, Any], expected: int) -> int:
    """Faults of a story; of one that is being told, those it may come to."""
    return expected if line.get("is_open") else len(line["faults"])


def read(path: Path) -> list[dict[str, Any]]:
    """The stories of a file, without a line that was cut."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """One row per case and kind."""
    rows = ["case      kind  runs  faults  rank  launcher  tree  different  hung or left  "
            "slowest end (s)"]
    for kind in ("kill", "term"):
        for case in CASES:
            mine = [line for line in lines if (line["case"], line["kind"]) == (case, kind)]
            faults = [fault for line in mine for fault in line["faults"]]
            if not faults:
                continue
            by = {t: sum(f["target"] == t for f in faults) for t in ("rank", "launcher", "tree")}
            bad = sum(bool(f["wrong"]) for f in faults)
            different = sum(bool(line["wrong"]) for line in mine)
            rows.append(
                f"{case:9} {kind:5} {len(mine):4}  {len(faults):6}  {by['rank']:4}  "
                f"{by['launcher']:8}  {by['tree']:4}  {different:9}  {bad:12}  "
                f"{max(f['seconds'] for f in faults):15.1f}")
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the first story of each case")
    parser.add_argument("--faults", type=int, default=5, help="most faults of one run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of two ranks each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--scratch", type=Path, help="where runs live (default: the system's)")
    parser.add_argument("--keep", action="store_true", help="leave the run folders")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
