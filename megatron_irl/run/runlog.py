"""The two logs a run keeps in its folder, one JSON object per line.

``metrics.jsonl`` has a line per optimizer step, ``rounds.jsonl`` a line per round. A line is on
the disk when the call returns, and a run killed at any instant leaves at worst one torn last line,
which readers skip and the next append removes.
"""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import sync_folder, write_errors, write_file

METRICS_FILE = "metrics.jsonl"
ROUNDS_FILE = "rounds.jsonl"

_ADVICE = ("Free some space or make the folder writable, then start the run again on the same "
           "folder; it resumes.")
_BLOCK = 4096
_RECENT = 256  # lines of each log that a checkpoint keeps: some 150 kB


class RunLog:
    """Append to and read back the logs of one run folder. For one writing process only."""

    def __init__(self, run_dir: str | Path, fence: Callable[[], None] | None = None) -> None:
        """Open the logs; nothing is read or created yet.

        Args:
            fence: Called before every write; raises if the folder is not ours any more.
        """
        self.run_dir = Path(run_dir)
        self._fence = fence or (lambda: None)
        self._metrics: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._rounds: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.metrics_path = self.run_dir / METRICS_FILE
        self.rounds_path = self.run_dir / ROUNDS_FILE

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the line of one optimizer step; ``record`` needs ``step`` and ``round``.

        A number that is not finite becomes null: JSON has no NaN, and a log line must not be what
        ends a run. Whether the loss is finite is the training step's business.

        Raises:
            UserError: The line could not be written (disk full, ...); the file is as before.
        """
        self._fence()
        self._metrics.append(_append(self.metrics_path, record))

    def log_round(self, record: Mapping[str, Any]) -> None:
        """Append the line of one finished round; as ``log_metrics``."""
        self._fence()
        self._rounds.append(_append(self.rounds_path, record))

    def recent(self) -> dict[str, list[dict[str, Any]]]:
        """The newest lines of both logs, for a checkpoint to keep; see ``level``."""
        return {"metrics": list(self._metrics), "rounds": list(self._rounds)}

    def level(
        self, step: int, round: int, kept: Mapping[str, list[dict[str, Any]]] | None = None
    ) -> list[str]:
        """Bring the logs level with a checkpoint: forget what is done again, restore what is lost.

        Args:
            step: Last optimizer step the restored checkpoint contains; later steps go.
            round: Round the run continues in, which is also how many rounds are finished; the
                line of that round and of every later one goes.
            kept: What ``recent`` gave when the checkpoint was saved. Lines of it that the logs have
                lost since (cut, damaged, deleted) are put back.

        Returns:
            What is lost for good, a sentence for each log.

        Raises:
            UserError: A log cannot be read or rewritten; it is as before.
        """
        self._fence()
        kept = kept or {}
        metrics = _level(self.metrics_path, "step", range(1, step + 1), kept.get("metrics", ()))
        rounds = _level(self.rounds_path, "round", range(round), kept.get("rounds", ()))
        self._metrics.extend(metrics[-_RECENT:])
        self._rounds.extend(rounds[-_RECENT:])
        return [
            f"{path.name} has lost {_some(missing)} for good; nothing else depends on it"
            for path, missing in (
                (self.metrics_path, _missing("step", range(1, step + 1), metrics)),
                (self.rounds_path, _missing("round", range(round), rounds)),
            ) if missing
        ]

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, [] where there is no such file."""
        return _read(self.metrics_path)

    def read_rounds(self) -> list[dict[str, Any]]:
        """Return the lines of ``rounds.jsonl``, [] where there is no such file."""
        return _read(self.rounds_path)


def _append(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a line; returns what it says."""
    missing = [key for key in ("step", "round") if key not in record]
    assert not missing, f"a line of {path.name} needs {missing}"
    said = _plain(record)
    line = json.dumps(said, allow_nan=False).encode() + b"\n"
    with write_errors(path, _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _write_line(descriptor, line)
        finally:
            os.close(descriptor)
        if path.stat().st_size == len(line):
            sync_folder(path.parent)  # the first line: the file's name must be durable as well
    return said


def _write_line(descriptor: int, line: bytes) -> None:
    """Write after the last complete line; on failure leave the file ending there."""
    end = _end_of_last_line(descriptor)
    try:
        if os.fstat(descriptor).st_size > end:
            os.ftruncate(descriptor, end)
        written = 0
        while written < len(line):
            written += os.pwrite(descriptor, line[written:], end + written)
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def _end_of_last_line(descriptor: int) -> int:
    """Return the offset just after the last newline, 0 without one."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    # What follows the last newline is empty, or a line the writer was killed in. A power cut can
    # leave the last line as long as it was, with other bytes.
    complete = _content(path).split(b"\n")[:-1]
    while complete and _parsed(complete[-1]) is None:
        complete.pop()
    return [_parse(path, number, line) for number, line in enumerate(complete, 1) if line.strip()]


def _content(path: Path) -> bytes:
    """The bytes of a log, none where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Move it away, then start the "
                        "run again on the same folder; what a checkpoint kept of it is put back."
                        ) from error


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}); every line of it is an object "
                        "written by the run. Remove the line.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number} is not a JSON object; every line of it is one. "
                        "Remove the line.")
    return record


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _level(
    path: Path, key: str, wanted: range, kept: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rewrite a log to the wanted lines, those of ``kept`` where it lacks them; returns them."""
    before = _content(path)
    records = [record for record in map(_parsed, before.split(b"\n")) if record is not None]
    # Later ones win. What the checkpoint kept is of the very steps that led to it; a line of the
    # log may have been damaged since, and of steps that it has not kept the last doing counts.
    by_number = {record[key]: record for record in (*records, *kept) if record.get(key) in wanted}
    lines = [by_number[number] for number in sorted(by_number)]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if content != before:
        write_file(path, content)
    return lines


def _missing(key: str, wanted: range, lines: list[dict[str, Any]]) -> list[str]:
    there = {line[key] for line in lines}
    return [f"{key} {number}" for number in wanted if number not in there]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON types, with null for numbers that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
