"""The commands of the Makefile and of continuous integration do what README says of them."""

import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_clean_leaves_results_alone():
    done = subprocess.run(
        ["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = done.stdout.split()
    assert "rm" in words and "runs" not in words and not any(w.startswith("runs/") for w in words)


def test_integration_runs_both_linters_and_the_tests():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert {".venv/bin/ruff check .", ".venv/bin/pyright", "make test"} <= set(lines)


def test_description_names_every_algorithm():
    text = (ROOT / "setup.py").read_text()
    (line,) = [line for line in text.splitlines() if "description=" in line and "long" not in line]
    assert all(name in line for name in ("SFT", "SPIN", "IRFT", "RFT)"))


def test_every_folder_of_tests_is_looked_into(pytestconfig):
    """pytest passes over some names of folders, ``dist`` among them, unless told not to."""
    left_out = pytestconfig.getini("norecursedirs")
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    names = {name for path in tests for name in path.parts[:-1]}
    assert "dist" in names
    assert [n for n in names if any(fnmatch(n, pattern) for pattern in left_out)] == []
