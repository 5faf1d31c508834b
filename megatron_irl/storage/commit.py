"""Files that appear whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_irl.errors import UserError

TEMPORARY_PATTERN = ".*.tmp"

# What the user can put right: a full disk or quota, a path that cannot be written.
USER_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
}  # fmt: skip


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Write ``path`` through a temporary file in the same folder, committed by rename.

    A reader sees the old file or the new one, never a part. The data and the folder entry are
    synced to disk, so a committed file survives a power cut. On any error nothing is left behind;
    a process killed in between leaves ``.<name>.tmp``, which the next write of ``path`` overwrites.
    One writer at a time.

    Raises:
        UserError: The disk is full or the path cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it exists and is not a regular file.")
    target = path.resolve()  # a link keeps pointing at the file it points at
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        raise UserError(
            f"cannot write {path}: {os.strerror(error.errno)}. Nothing was written; free some "
            "space or choose another folder, then start again."
        ) from error
    finally:
        _remove_quietly(temporary)


@contextmanager
def disk_errors(target: str | Path, *, cleanup: str | Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a UserError, leaving nothing of ``cleanup`` behind.

    For writers that own a whole temporary folder; libraries written in other languages report a
    full disk in words, without an errno.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(cleanup, ignore_errors=True)
        in_words = any(text in str(error) for text in ("No space left", "os error 28", "code: 28"))
        if in_words or (isinstance(error, OSError) and error.errno in USER_ERRNOS):
            raise UserError(
                f"cannot write {target}: {error}. Nothing was left half-written; free some space "
                "or choose another folder, then start again."
            ) from error
        raise


def write_jsonl_atomically(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line; the file appears only once it is complete.

    Returns:
        How many records were written.

    Raises:
        UserError: The disk is full or the path cannot be written.
    """
    count = 0
    with replacing(path) as file:
        for record in records:
            file.write(json_line(record))
            count += 1
    return count


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of a JSON Lines file, its line break included."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    # An unpaired surrogate has no UTF-8; "backslashreplace" spells it as JSON would.
    return line.encode("utf-8", "backslashreplace") + b"\n"


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to disk: a file renamed into it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the usual case: renamed away, or never created
