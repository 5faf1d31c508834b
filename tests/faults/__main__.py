"""Kill runs at random and see that nothing is lost: ``python -m tests.faults --out faults.jsonl``.

Every line of the file is a story: a run, what it was hit with, and what was wrong. Started again
with the same file, it goes on with the stories that are missing, until there are as many faults as
asked for. The table is of all lines; the exit code is 1 if anything was wrong.

With ``--forked`` most starts are forks of a process that has imported everything (see ``forked``),
which takes a start from twenty seconds to a few; every tenth story has fresh processes, and so have
the references, which those of forked runs must equal.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.cases import CASES, write_inputs
from tests.faults.forked import Zygote
from tests.faults.instants import INSTANTS
from tests.faults.story import Reference, differences, make_reference, tell_story

FRESH_EVERY = 10  # stories of a forked session that are told of fresh processes


def main() -> int:
    options = parse()
    lines = read(options.out)
    wanted = {"kill": options.kills, "term": options.terms}
    root = Path(tempfile.mkdtemp(prefix="faults_", dir=options.scratch))
    zygote = Zygote() if options.forked else None
    try:
        write_inputs(root)
        with ThreadPoolExecutor(options.jobs) as workers:
            references = read_references(options.references)
            missing = [case for case in options.cases if case not in references]
            references |= zip(missing, workers.map(
                lambda case: reference_of(case, root, zygote), missing), strict=True)
            write_references(options.references, references)
            lock = threading.Lock()
            turns = [workers.submit(turn, options, wanted, lines, references, root, lock, zygote)
                     for _ in range(options.jobs)]
            for each in turns:
                each.result()
    finally:
        if zygote is not None:
            zygote.close()
        if options.keep:
            sys.stdout.write(f"kept {root}\n")
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.stdout.write(table(lines) + "\n")
    return int(any(line["wrong"] for line in lines))


def read_references(path: Path | None) -> dict[str, Reference]:
    """Those of an earlier call; if the code has changed since, its stories will differ."""
    if path is None or not path.exists():
        return {}
    return {case: Reference(**known) for case, known in json.loads(path.read_text()).items()}


def write_references(path: Path | None, references: dict[str, Reference]) -> None:
    if path is not None:
        path.write_text(json.dumps({case: asdict(each) for case, each in references.items()}))


def reference_of(case: str, root: Path, zygote: Zygote | None) -> Reference:
    """The uninterrupted run, of fresh processes; one of forked ones must be the same."""
    reference = make_reference(case, root)
    if zygote is None:
        return reference
    forked = make_reference(case, root, zygote)
    differing = differences(reference.trajectory, forked.trajectory)
    assert not differing, f"{case}: forked ranks differ in {', '.join(differing)}"
    sys.stdout.write(f"{case}: a forked run is bitwise one of fresh processes; takes the folder "
                     f"after {forked.opening:.1f} s instead of {reference.opening:.1f}\n")
    sys.stdout.flush()
    return forked


def turn(
    options: argparse.Namespace, wanted: dict[str, int], lines: list[dict[str, Any]],
    references: dict[str, Reference], root: Path, lock: threading.Lock, zygote: Zygote | None,
) -> None:
    """Tell stories until there are enough; of several threads each takes the next one."""
    until = time.monotonic() + 60 * options.minutes
    while time.monotonic() < until:
        with lock:
            story = next_story(options, wanted, lines)
            if story is None:
                return
            lines.append(story)  # a place, so that nobody takes it too
        is_fresh = (CASES.index(story["case"]) + story["seed"]) % FRESH_EVERY == 0
        told = tell_story(story["case"], root, references[story["case"]], kind=story["kind"],
                          seed=story["seed"], num_faults=options.faults,
                          zygote=None if is_fresh else zygote)
        with lock:
            story |= told.to_dict()
            story.pop("is_open")
            with open(options.out, "a") as file:
                file.write(json.dumps(story) + "\n")
            said = "; ".join(told.wrong) or "same"
            sys.stdout.write(f"{told.case} {told.kind} seed {told.seed}, {told.mode}: "
                             f"{len(told.faults)} faults in {told.seconds:.0f} s, {said}\n")
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
    """One row per case, kind and how its processes were started."""
    head = ["case", "kind", "starts", "runs", "faults", "rank", "launcher", "tree", *INSTANTS,
            "different", "hung or left", "slowest end (s)"]
    rows = [head]
    keys = sorted({(line["kind"], CASES.index(line["case"]), line["mode"]) for line in lines})
    for kind, number, mode in keys:
        case = CASES[number]
        mine = [line for line in lines
                if (line["case"], line["kind"], line["mode"]) == (case, kind, mode)]
        faults = [fault for line in mine for fault in line["faults"]]
        numbers = [len(mine), len(faults)]
        numbers += [sum(f["target"] == t for f in faults) for t in ("rank", "launcher", "tree")]
        numbers += [sum(f["during"] == t for f in faults) for t in INSTANTS]
        numbers += [sum(bool(line["wrong"]) for line in mine),
                    sum(bool(f["wrong"]) for f in faults)]
        slowest = max((f["seconds"] for f in faults), default=0.0)
        rows.append([case, kind, mode, *map(str, numbers), f"{slowest:.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows[1:]])


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
    parser.add_argument("--forked", action="store_true", help="fork processes that have imported "
                        "everything, save in every tenth story")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="begin no story after so many")
    parser.add_argument("--references", type=Path, metavar="FILE", help="uninterrupted runs of an "
                        "earlier call of the same code, or where to write them")
    parser.add_argument("--keep", action="store_true", help="leave the run folders")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
