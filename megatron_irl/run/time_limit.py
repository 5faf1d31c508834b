"""When the job that this process is part of ends, as Slurm says."""

import contextlib
import os
import subprocess
import time


class TimeLimit:
    """Whether the end of the Slurm job is nearer than a number of seconds.

    The limit of a job may be changed while it runs, so Slurm is asked again before time is up.

    Args:
        seconds: How long before the limit time is up; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else _first_end()

    @property
    def is_known(self) -> bool:
        return self._end is not None

    def is_near(self) -> bool:
        """Whether time is up."""
        if self.seconds is None or self._end is None or not self._is_within(self.seconds):
            return False
        self._end = _ask_slurm() or self._end
        return self._is_within(self.seconds)

    def _is_within(self, seconds: float) -> bool:
        return self._end is not None and time.time() >= self._end - seconds


def _first_end() -> float | None:
    """In seconds since the epoch; None outside a job, or without a limit."""
    given = os.environ.get("SLURM_JOB_END_TIME", "")  # of Slurm 23.02 and later
    return float(given) if given.isdecimal() else _ask_slurm()


def _ask_slurm() -> float | None:
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return time.time() + _seconds(done.stdout.split()[0])
    return None  # no squeue here (a container may have none), no answer, or no limit


def _seconds(text: str) -> float:
    """Seconds of squeue's ``[days-][[hours:]minutes:]seconds``.

    Raises:
        ValueError: It is something else, as UNLIMITED or INVALID.
    """
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return float(total + 86400 * int(days or 0))
