"""Run every GPU test and print what came of each: a table, and JSON with ``--json FILE``.

    python tools/gpu_checks.py [--json checks.json] [-k EXPRESSION]

Needs pytest and one GPU. What is missing (Transformer Engine, flash-attn, a Blackwell for mxfp8)
skips the tests that need it and says so.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Collector:
    """A pytest plugin that remembers outcome, seconds and reason of every test."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called for set-up, test and tear-down; the first failure of the three counts."""
        name = report.nodeid.removeprefix("tests/gpu/")
        known = self.results.setdefault(name, {"outcome": "passed", "seconds": 0.0, "reason": ""})
        known["seconds"] = round(known["seconds"] + report.duration, 2)
        if report.outcome != "passed" and known["outcome"] == "passed":
            known |= {"outcome": report.outcome, "reason": _reason(report)}
            print(f"{report.outcome}: {name}: {known['reason']}", flush=True)


def _reason(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return " ".join(lines[0].split()[1:]) if lines else str(report.longrepr)[-200:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("-k", dest="expression", help="only tests that match, as pytest's -k")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    collector, start = Collector(), time.perf_counter()
    chosen = ["-k", options.expression] if options.expression else []
    code = pytest.main(["tests/gpu", "-q", "--tb=short", *chosen], plugins=[collector])
    seconds = round(time.perf_counter() - start, 1)
    width = max(map(len, collector.results), default=0)
    for name, result in collector.results.items():
        print(f"{name:{width}}  {result['outcome']:8}{result['seconds']:8.1f} s  "
              f"{result['reason'][:100]}")
    counts = {outcome: sum(r["outcome"] == outcome for r in collector.results.values())
              for outcome in ("passed", "failed", "skipped")}
    print(f"{counts} in {seconds} s")
    if options.json:
        report = {"seconds": seconds, **counts, "tests": collector.results}
        options.json.write_text(json.dumps(report, indent=1))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
