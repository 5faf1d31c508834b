"""The one way files and folders come onto the disk: whole or not at all, or one message why not."""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_irl.errors import UserError

TEMPORARY_PATTERN = ".*.tmp"
_CHECKSUM = "crc32"  # the key of ``checked_json``

# What the user can put right: a full disk, quota or file-size limit, a path that cannot be written.
USER_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE,
}  # fmt: skip

# Libraries written in other languages, and errors that came from another process or rank, have no
# errno but speak of it: Rust's "os error 28", Python's own "[Errno 28]", C++ in words.
_SPOKEN_ERRNO = re.compile(r"(?:\[Errno |os error |code: )(\d+)")
_SPOKEN = {os.strerror(n): n for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}


def disk_error(error: BaseException) -> str | None:
    """What the system said of a disk, if that is what an error comes from; else None.

    Causes are looked through too, and the failures of several ranks that torch puts in one
    (``CheckpointException.failures``: error and traceback by rank).
    """
    for each in _causes(error):
        number = each.errno if isinstance(each, OSError) else None
        if number is None:
            spoken = _SPOKEN_ERRNO.search(str(each))
            words = next((n for text, n in _SPOKEN.items() if text in str(each)), None)
            number = int(spoken[1]) if spoken else words
        if number in USER_ERRNOS:
            return os.strerror(number)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        failures = getattr(error, "failures", None)
        for wrapped in failures.values() if isinstance(failures, dict) else ():
            yield from _causes(wrapped[0])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def write_errors(
    target: str | Path, advice: str = "Nothing was left half-written; free some space or choose "
    "another folder, then start again."
) -> Iterator[None]:
    """Turn every failure to write ``target`` that is the disk's into one UserError.

    Raises:
        UserError: The disk is full or at a limit, or the path cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any library; what is not the disk's goes on as it is
        said = disk_error(error)
        if said is None:
            raise
        raise UserError(f"cannot write {target}: {said}. {advice}") from error


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
    with write_errors(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)  # or a power cut takes the new name back
        finally:
            _remove_quietly(temporary)


def write_file(path: str | Path, content: bytes) -> None:
    """As ``replacing``, of content that is all there."""
    with replacing(path) as file:
        file.write(content)


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a file that can be made again; None where it is missing or damaged.

    One that ``checked_json`` made is compared with its checksum, which is left out.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict):
        return None
    said = value.pop(_CHECKSUM, None)
    return value if said in (None, _crc32_of_json(value)) else None


def checked_json(value: Mapping[str, Any]) -> bytes:
    """An object as JSON with a checksum of itself in it, for ``read_json``."""
    return json.dumps({**value, _CHECKSUM: _crc32_of_json(value)}).encode()


def _crc32_of_json(value: Mapping[str, Any]) -> str:
    # By way of JSON, which makes lists of tuples and strings of keys.
    plain = json.loads(json.dumps(value))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def entry_of(path: Path) -> dict[str, Any]:
    """Size and CRC-32 of a file, which is read for it, as manifests have them."""
    crc = size = 0
    with open(path, "rb") as file:
        while data := file.read(4 << 20):  # few calls, and little beside what a rank holds
            crc, size = zlib.crc32(data, crc), size + len(data)
    return entry(size, crc)


def entry(bytes: int, crc32: int) -> dict[str, Any]:
    """As ``entry_of``, of what is known."""
    return {"bytes": bytes, "crc32": f"{crc32:08x}"}


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


@contextmanager
def replacing_folder(final: str | Path) -> Iterator[Path]:
    """Fill a new folder, then put it in the place of ``final``, which may exist.

    Yields an empty folder beside it, under a dotted name; what an earlier attempt left there is
    removed. On an error nothing is left behind and the old folder is as it was.

    Raises:
        UserError: The disk is full or not writable.
    """
    final = Path(final)
    partial = unfinished(final)
    with write_errors(final):
        try:
            fresh_folder(partial)
            yield partial
            commit_folder(partial, final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def unfinished(final: Path) -> Path:
    """Where a folder is built before it is put in place."""
    return final.with_name(f".{final.name}.partial")


def fresh_folder(folder: Path) -> None:
    """Make an empty folder, in the place of whatever an earlier attempt left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def commit_folder(new: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``, its files on disk first.

    An old folder is moved aside before, never half deleted: a kill between the two renames leaves
    it as ``.<name>.old``, which ``put_back`` returns.
    """
    # Before the rename: a power cut could else leave the name without the content.
    for path in (*new.rglob("*"), new):
        sync_folder(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(final: Path) -> None:
    """Undo a replacement of ``final`` that was killed between its two renames.

    For the process that writes it, before it looks: to anybody else a replacement in progress
    looks the same.
    """
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        os.replace(old, final)


def sync_folder(path: Path) -> None:
    """Bring a file, or a folder's entries, to disk: what was renamed into it survives a power
    cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the usual case: renamed away, or never created
