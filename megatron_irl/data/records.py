"""Raw records from JSONL and Parquet, and the checks that name file and line."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_irl.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
MAX_SHOWN = 5  # errors spelled out in one message
BATCH_SIZE = 128  # records taken together: work for many cores, and little memory even if long

Messages = list[dict[str, Any]]


class RecordError(UserError):
    """One record or text is unusable; loaders put file and line before the message."""


def collect[T](
    paths: str | Path | Iterable[str | Path],
    build: Callable[[dict[str, Any], str], T | None],
    limit: int | None = None,
) -> list[T]:
    """Return ``build(record, source)`` of every record, leaving out where it returns None.

    As ``collect_in_batches``, for records that gain nothing from each other's company.
    """
    return collect_in_batches(paths, build, list, lambda result, _: result, limit)


def collect_in_batches[Prepared, Shared, T](
    paths: str | Path | Iterable[str | Path],
    prepare: Callable[[dict[str, Any], str], Prepared],
    share: Callable[[list[Prepared]], list[Shared]],
    build: Callable[[Prepared, Shared], T | None],
    limit: int | None = None,
) -> list[T]:
    """Return what ``build`` makes of every record, leaving out where it returns None.

    Args:
        paths: One file or several.
        prepare: (record, source) → what the other two are given.
        share: What is cheaper to do for many at once: a batch → as many results.
        build: (prepared, its result of ``share``) → what is returned, or None.
        limit: Stop once there are this many; no record is read that could not be one of them.

    All files are read to the end (or to ``limit`` results) before errors are reported, so that
    one message names the first few of them and the total.

    Raises:
        UserError: A file is missing, empty or unreadable, or ``prepare`` or ``build`` raised
            RecordError.
    """
    results: list[T] = []
    problems: list[str] = []
    batch: list[tuple[str, Prepared | RecordError]] = []

    def finish() -> None:
        shared = iter(share([p for _, p in batch if not isinstance(p, RecordError)]))
        for source, prepared in batch:
            try:
                if isinstance(prepared, RecordError):
                    raise prepared
                result = build(prepared, next(shared))
            except RecordError as error:
                problems.append(f"{source}: {error}")
                continue
            if result is not None:
                results.append(result)
        batch.clear()

    for path in [paths] if isinstance(paths, str | Path) else paths:
        source = None
        for source, raw in _read(Path(path)):
            if limit is not None and len(results) >= limit:
                break
            try:
                batch.append((source, prepare(_as_object(raw), source)))
            except RecordError as error:
                batch.append((source, error))
            room = BATCH_SIZE if limit is None else limit - len(results)
            if len(batch) >= min(room, BATCH_SIZE):
                finish()
        if source is None:
            raise UserError(f"{path}: the file has no records.")
    finish()
    if problems:
        raise UserError(_describe(problems))
    return results


def checked_text(record: dict[str, Any], key: str, allow_empty: bool = False) -> str:
    """Return ``record[key]``, a string with something in it."""
    if record.get(key) is None:
        raise RecordError(f'no "{key}"')
    return _text(record[key], f'"{key}"', allow_empty)


def checked_texts(record: dict[str, Any], key: str) -> list[str]:
    """Return ``record[key]``, a list of strings with at least one entry; entries may be empty."""
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise RecordError(f'"{key}" must be a non-empty list of strings')
    return [_text(value, f'"{key}"[{i}]', allow_empty=True) for i, value in enumerate(values)]


def checked_prompt(record: dict[str, Any]) -> str | Messages:
    """Return ``record["prompt"]``: a non-empty string, or messages that await the assistant."""
    if not isinstance(record.get("prompt"), list):
        return checked_text(record, "prompt")
    return awaiting_assistant(checked_messages(record["prompt"], "prompt"))


def checked_messages(messages: Any, key: str) -> Messages:
    """Return the messages with null fields left out (Parquet fills them in for absent ones)."""
    if not isinstance(messages, list):
        raise RecordError(f'"{key}" must be a list of messages, not {_kind(messages)}')
    checked: Messages = []
    for i, message in enumerate(messages):
        where = f'"{key}"[{i}]'
        if not isinstance(message, dict):
            raise RecordError(f"{where} must be an object, not {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise RecordError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
        _text(message.get("content"), f"{where}: content", allow_empty=True)
        checked.append({k: v for k, v in message.items() if v is not None})
    return checked


def awaiting_assistant(messages: Messages) -> Messages:
    """Return the messages if they can be a prompt: some text, and not the assistant's turn done."""
    if not any(message["content"].strip() for message in messages):
        raise RecordError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise RecordError("the prompt ends with an assistant message; nothing is left to answer")
    return messages


def _text(value: Any, name: str, allow_empty: bool) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} must be a string, not {_kind(value)}")
    if not allow_empty and not value.strip():
        raise RecordError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{name} holds an unpaired surrogate: {error}") from None
    return value


def _read(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yield (source, raw record); sources count from 1."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    yield f"{path}:{number}", line
        else:
            raise UserError(
                f"{path}: unknown kind of file; use .jsonl (one JSON object a line), "
                ".jsonl.gz or .parquet."
            )
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row


def _as_object(raw: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    if not raw.strip():
        raise RecordError("empty line")
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise RecordError(f"must be a JSON object, not {_kind(record)}")
    return record


def _describe(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = list(islice(problems, MAX_SHOWN))
    rest = len(problems) - len(shown)
    lines = [f"{len(problems)} records cannot be used:", *shown]
    return "\n  ".join(lines + ([f"... and {rest} more"] if rest else []))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"{value!r}")
