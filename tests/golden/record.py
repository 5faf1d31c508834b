"""Record what the code of this tree does: ``python -m tests.golden.record --out FILE``.

Start it in the root of a clean checkout: a recording from a dirty tree is refused, since nobody
could say later what was recorded. ``python -m tests.golden.compare FILE`` compares another tree
with it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from tests.dist.pool import ROOT, Pool
from tests.golden import cases, ranks
from tests.golden.inputs import write_inputs
from tests.golden.trajectory import Trajectory, read_trajectory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record every golden run.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", action="append", help="runs by name, as irft_*/tp2")
    options = parser.parse_args(argv)
    source = describe_source()
    if source["dirty"]:
        sys.stderr.write("The tree is dirty; commit first, so that the record can name what it is "
                         "of:\n  " + "\n  ".join(source["dirty"]) + "\n")
        return 2
    names = selected(options.only)
    # By name only: where the file was written first is of no use to who repeats it.
    only = [f"--only {name}" for name in options.only or ()]
    command = " ".join(["python -m tests.golden.record --out", options.out.name, *only])
    with closing(Pool()) as pool, tempfile.TemporaryDirectory() as scratch:
        environment = pool.run(1, ranks.environment)[0]
        runs = dict(record(pool, Path(scratch), names, say=True))
    header = {
        "command": command, "commit": source["commit"], "product": source["product"],
        "environment": environment,
    }
    options.out.write_text(dump(header, runs))
    return 0


def record(
    pool: Pool, scratch: Path, names: Iterable[str], *, say: bool = False
) -> Iterator[tuple[str, Trajectory]]:
    """Run each of ``names`` in ``scratch``, and yield its name and what it did."""
    inputs = write_inputs(scratch / "inputs")
    for name in names:
        start = time.monotonic()
        run = name.replace("/", "_")
        path = inputs / f"{run}.yaml"
        path.write_text(yaml.safe_dump(cases.recipe(name, run)))
        train(pool, cases.world_size(name), path)
        if say:
            sys.stderr.write(f"{name} {time.monotonic() - start:.1f} s\n")
        yield name, read_trajectory(inputs / run)


def train(pool: Pool, world_size: int, recipe: Path) -> None:
    """Run ``train RECIPE`` on ranks of the pool, in the recipe's folder."""
    arguments = {"arguments": ["train", recipe.name], "cwd": str(recipe.parent)}
    for code, errors in pool.run(world_size, ranks.command, **arguments):
        if code:
            raise RuntimeError(f"{recipe.name} ended with code {code}:\n{errors}")


def selected(patterns: list[str] | None) -> list[str]:
    """The recorded runs that match one of the patterns; all of them without any."""
    names = [n for n in cases.names() if not patterns or any(fnmatch(n, p) for p in patterns)]
    if not names:
        raise SystemExit(f"no run matches {patterns}; there are {', '.join(cases.names())}")
    return names


def describe_source(root: Path = ROOT) -> dict[str, Any]:
    """Of a checkout: its last commit to the package, the package's tree, and what differs."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True,
                              check=True)
        return done.stdout

    return {
        "commit": git("log", "-1", "--format=%H", "--", "megatron_irl").strip(),
        "product": git("rev-parse", "HEAD:megatron_irl").strip(),
        "dirty": git("status", "--porcelain").splitlines(),
    }


def dump(header: dict[str, Any], runs: dict[str, Trajectory]) -> str:
    """A JSON text with a line for every run, so that a difference of two records can be read."""
    head = json.dumps(header, indent=1)[:-2]
    lines = [f"  {json.dumps(n)}: {json.dumps(r, separators=(',', ':'))}" for n, r in runs.items()]
    return head + ',\n "runs": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    sys.exit(main())
