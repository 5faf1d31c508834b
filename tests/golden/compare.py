"""Compare this tree with a record: ``python -m tests.golden.compare FILE [--exact]``.

On the machine and with the libraries of the record every number must be the same to the last bit.
Elsewhere losses and gradient norms must be within 1e-5, relative (bf16: 1e-2); rounding may there
draw another sample, after which a run is another run: from that round on nothing is compared, and
that is said.
``--exact`` asks for the same bits wherever it runs. Code 0: equal; 1: not.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.dist.pool import Pool
from tests.golden import cases, ranks
from tests.golden.record import record, selected
from tests.golden.trajectory import Trajectory

# Relative, of losses and gradient norms under another environment, by precision.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
NEAR_ZERO = 1e-5  # losses that are means of signed terms pass through zero


@dataclass
class Findings:
    """Differences, which fail a comparison, and notes, which do not."""

    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare this tree's runs with a record.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--exact", action="store_true", help="the same bits on any machine")
    parser.add_argument("--only", action="append", help="runs by name, as irft_*/tp2")
    options = parser.parse_args(argv)
    known = json.loads(options.record.read_text())
    names = [name for name in selected(options.only) if name in known["runs"]]
    start, failed = time.monotonic(), 0
    with closing(Pool()) as pool, tempfile.TemporaryDirectory() as scratch:
        here = pool.run(1, ranks.environment)[0]
        exact = options.exact or describe_mode(known["environment"], here)
        for name, now in record(pool, Path(scratch), names):
            found = compare(
                known["runs"][name], now, exact=exact, tolerance=tolerance_of(name)
            )
            failed += bool(found.differences)
            sys.stdout.write(f"{name}: {'DIFFERS' if found.differences else 'equal'}\n")
            for line in found.differences + found.notes:
                sys.stdout.write(f"  {line}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(names) - failed} of {len(names)} runs are those of {known['commit']}, "
                     f"{'bit for bit' if exact else 'within rounding'}; "
                     f"{time.monotonic() - start:.0f} s\n")
    return 1 if failed or not names else 0


def describe_mode(recorded: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether the environment is the record's; says what differs."""
    other = {key: (value, here.get(key)) for key, value in recorded.items()
             if here.get(key) != value}
    for key, (then, now) in other.items():
        sys.stdout.write(f"{key}: recorded with {then}, here {now}\n")
    return not other


def tolerance_of(name: str) -> float:
    """What rounding may do to a recorded run's losses, by the precision it has."""
    return TOLERANCES[cases.recipe(name, "")["precision"]]


def compare(
    then: Trajectory, now: Trajectory, *, exact: bool, tolerance: float = TOLERANCES["fp32"]
) -> Findings:
    """Compare what a run did with what it did when recorded; keys that are new are ignored."""
    found = Findings()
    if len(then["steps"]) != len(now["steps"]) or len(then["samples"]) != len(now["samples"]):
        found.differences.append(
            f"{len(then['steps'])} steps and {len(then['samples'])} rounds of samples were "
            f"recorded, now {len(now['steps'])} and {len(now['samples'])}")
        return found
    if exact:
        _compare_digests(then, now, found)
    last = _rounds_alike(then, now, found, exact=exact)
    for step, (a, b) in enumerate(zip(then["steps"], now["steps"], strict=True), start=1):
        if last is not None and a[0] >= last:
            break
        bound = 0.0 if exact else tolerance
        if not all(_equal(x, y, bound) for x, y in zip(a, b, strict=True)):
            found.differences.append(f"step {step}: [round, loss, gradient norm] was {a}, is {b}")
            break  # what follows from it differs too
    return found


def _rounds_alike(
    then: Trajectory, now: Trajectory, found: Findings, *, exact: bool
) -> int | None:
    """The first round whose samples are others; in another environment that is no fault."""
    for index, (a, b) in enumerate(zip(then["samples"], now["samples"], strict=True)):
        if a["ids"] != b["ids"] and not exact:
            found.notes.append(f"round {index} drew other samples than were recorded elsewhere; "
                               "nothing is compared from there on")
            return index
    return None


def _compare_digests(then: Trajectory, now: Trajectory, found: Findings) -> None:
    for index, (a, b) in enumerate(zip(then["samples"], now["samples"], strict=True)):
        others = [key for key in a if a[key] != b.get(key)]
        if others:
            found.differences.append(f"round {index}: other {', '.join(others)} of the samples")
    for kind in ("metrics", "weights"):
        others = [key for key in then[kind] if then[kind][key] != now[kind].get(key)]
        if others:
            found.differences.append(f"other {kind}: {', '.join(others)}")
    for index, (a, b) in enumerate(zip(then["evaluation"], now["evaluation"], strict=True)):
        for key in a:
            if a[key] != b.get(key):
                found.differences.append(
                    f"round {index}: evaluation {key} was {a[key]}, is {b.get(key)}")


def _equal(then: float, now: float, tolerance: float) -> bool:
    """Whether two numbers agree; a tolerance of 0 asks for the same bits."""
    near_zero = NEAR_ZERO if tolerance else 0.0
    return then == now or math.isclose(then, now, rel_tol=tolerance, abs_tol=near_zero)


if __name__ == "__main__":
    sys.exit(main())
