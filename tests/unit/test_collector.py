"""What a run sets aside from collections, in a process of its own: this one has set much aside."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc
from megatron_irl.collector import keep_aside, settled
if {before}:
    keep_aside()
own = gc.get_freeze_count()
more = [[] for _ in range(1000)]
with settled():
    within = gc.get_freeze_count()
print(within > own + 1000, within == own, gc.get_freeze_count() >= own)
"""


@pytest.mark.parametrize(("before", "expected"), [
    (False, "True False False"), (True, "False True True"),
])
def test_what_was_set_aside_before_a_run_stays_so(before, expected):
    """Python can only take back all of it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(before=before)], text=True,
                          cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert done.stdout.strip() == expected
