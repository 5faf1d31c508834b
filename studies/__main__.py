"""``python -m studies run FILE... --out DIR [--jobs N]``, ``report DIR`` and ``cost FILE``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# A thread a point, before torch is loaded: more of them than cores wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_irl.errors import UserError
from studies.cost import cost_table
from studies.report import picture, table
from studies.study import read_study, run_study
from studies.why import why_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="studies", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="run studies, or go on with them")
    run.add_argument("studies", type=Path, nargs="+")
    run.add_argument("--out", type=Path, default=Path("runs/study"))
    run.add_argument("--jobs", type=int, default=1, help="points at a time")
    report = commands.add_parser("report", help="tables and pictures of finished studies")
    report.add_argument("out", type=Path)
    cost = commands.add_parser("cost", help="processor seconds of each method's training")
    cost.add_argument("study", type=Path)
    cost.add_argument("--out", type=Path, default=Path("runs/study"))
    cost.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    out = options.out.resolve()
    try:
        if options.command == "cost":
            print(cost_table(read_study(options.study), out, options.repeats))
            return 0
        if options.command == "run":
            for path in options.studies:
                run_study(read_study(path), out, options.jobs)
        for path in sorted(out.glob("*.json")):
            results = json.loads(path.read_text())
            picture(results, path.with_suffix(".png"))
            path.with_suffix(".md").write_text(f"{table(results)}\n\n{why_table(results)}\n")
            print(table(results) + "\n")
            print(why_table(results) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
