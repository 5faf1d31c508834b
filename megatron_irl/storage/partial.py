"""A JSON Lines file that is written part by part, over several starts of a command if need be."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import json_line, sync_folder, write_errors, write_file
from megatron_irl.storage.tables import write_parquet_of_lines


class PartialJsonl:
    """The lines of ``path`` finished so far, until ``finish`` makes them ``path``.

    They are in a folder ``.<name>.partial`` beside it: ``lines.jsonl``, and ``settings.json``,
    which says what they were made from. Lines of other settings are refused and not discarded:
    they may be hours of work, and to remove a folder is easy. One process at a time.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Nothing is read or created yet.

        Args:
            path: The file to be.
            settings: Everything the lines depend on, as JSON takes it.
        """
        self.path = path
        self.folder = path.resolve().with_name(f".{path.resolve().name}.partial")
        self._settings = json.loads(json.dumps(settings))
        self._lines = self.folder / "lines.jsonl"
        self._lock: BinaryIO | None = None

    def begin(self) -> int:
        """Open for appending; returns how many lines are there already.

        A last line that a kill or a power cut left half-written is cut off.

        Raises:
            UserError: The lines are of other settings, another process is writing them, or the
                folder cannot be written.
        """
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"cannot write {self.path}: it exists and is not a regular file.")
        with self._write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            # A lock of the file: the system gives it back with the process, however that ends.
            self._lock = open(self._lines, "ab")
            self._take_lock(self._lock)
            count, size = self._whole_lines()
            if count:
                self._check_settings(count)
            write_file(self.folder / "settings.json", json.dumps(self._settings, indent=1).encode())
            os.truncate(self._lines, size)
        return count

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are on disk when this returns.

        Raises:
            UserError: The disk is full; the lines before are kept.
        """
        with self._write_errors(), open(self._lines, "ab") as file:
            file.writelines(map(json_line, records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Make the lines ``path``, replacing what was there: renamed, or written as Parquet."""
        with self._write_errors():
            if self.path.suffix == ".parquet":
                write_parquet_of_lines(self._lines, self.path)
            else:
                os.replace(self._lines, self.folder.parent / self.path.resolve().name)
                sync_folder(self.folder.parent)
            # First the lines: left without their settings they would belong to nobody.
            self._lines.unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another process go on."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is being written by another process. Wait for it, or "
                            f"give another file than {self.path}.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise  # these three: a file system without locks, where the user must see to it

    def _whole_lines(self) -> tuple[int, int]:
        """How many whole lines there are, and their bytes; a power cut can leave zeros too."""
        count = size = 0
        with open(self._lines, "rb") as file:
            for line in file:
                if not (line.startswith(b"{") and line.endswith(b"}\n")) or b"\0" in line:
                    break
                count, size = count + 1, size + len(line)
        return count, size

    def _check_settings(self, count: int) -> None:
        path = self.folder / "settings.json"
        try:
            known = dict(json.loads(path.read_text()))
        except FileNotFoundError:
            known = {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}), so what the {count} finished lines "
                            f"of {self.path} were made with is not known. Remove {self.folder} to "
                            "begin anew, or write to another file.") from error
        names = sorted(k for k in known.keys() | self._settings if
                       known.get(k) != self._settings.get(k))
        if names:
            different = ", ".join(f"{name}={known.get(name)!r} there and "
                                  f"{self._settings.get(name)!r} now" for name in names)
            raise UserError(f"{self.folder} has {count} finished lines of {self.path}, made with "
                            f"other settings: {different}. Start with the settings there to go on, "
                            f"remove {self.folder} to begin anew, or write to another file.")

    def _write_errors(self) -> AbstractContextManager[None]:
        return write_errors(self.folder, "The lines finished before are kept; free some space, "
                            "then start the same command again.")
