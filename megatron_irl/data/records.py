"""From files to what is made of their records, with the errors of all of them in one message."""

from collections.abc import Callable
from typing import Any

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.conversation import Messages as Messages
from megatron_irl.data.forms import Purpose
from megatron_irl.data.readers import EmptyAnswer
from megatron_irl.data.readers import RecordError as RecordError
from megatron_irl.data.sources import Paths, Reading, Records
from megatron_irl.errors import UserError

MAX_SHOWN = 5  # errors spelled out in one message
MAX_PLACES = 50  # records without an answer that are named in a note
EMPTY_SHARE = 10  # one record in so many may be without an answer, and is left out
BATCH_SIZE = 128  # records taken together: work for many cores, and little memory even if long


def collect[T](
    paths: Paths | Reading,
    build: Callable[[list[Conversation], dict[str, Any]], T | None],
    purpose: Purpose = "demonstration",
) -> list[T]:
    """Return ``build(conversations, record)`` of every record, leaving out where it returns None.

    As ``collect_in_batches``, for records that gain nothing from each other's company. There is one
    conversation a record, except for the purpose ``score``: one per response.
    """
    def prepare(conversations: list[Conversation], record: dict[str, Any]) -> Any:
        return conversations, record

    return _collect(Reading.of(paths), purpose, prepare, lambda batch: batch,
                    lambda prepared, _: build(*prepared), None)


def collect_in_batches[Prepared, Shared, T](
    paths: Paths | Reading,
    prepare: Callable[[Conversation], Prepared],
    share: Callable[[list[Prepared]], list[Shared]],
    build: Callable[[Prepared, Shared], T | None],
    limit: int | None = None,
    purpose: Purpose = "demonstration",
) -> list[T]:
    """Return what ``build`` makes of every record, leaving out where it returns None.

    Args:
        paths: One file or several, or how they are to be read.
        prepare: What a record says → what the other two are given.
        share: What is cheaper to do for many at once: a batch → as many results.
        build: (prepared, its result of ``share``) → what is returned, or None.
        limit: Stop once there are this many; no record is read that could not be one of them.
        purpose: What the records must hold.

    All files are read to the end (or to ``limit`` results) before errors are reported, so that
    one message names the first few of them and the total.

    Raises:
        UserError: A file is missing, empty or unreadable, or a record is unusable: in itself, or
            because ``prepare`` or ``build`` raised RecordError; unless such records are dropped.
    """
    def prepare_first(conversations: list[Conversation], record: dict[str, Any]) -> Prepared:
        del record
        return prepare(conversations[0])

    return _collect(Reading.of(paths), purpose, prepare_first, share, build, limit)


def _collect[Prepared, Shared, T](
    reading: Reading,
    purpose: Purpose,
    prepare: Callable[[list[Conversation], dict[str, Any]], Prepared],
    share: Callable[[list[Prepared]], list[Shared]],
    build: Callable[[Prepared, Shared], T | None],
    limit: int | None,
) -> list[T]:
    results: list[T] = []
    problems: dict[str, RecordError] = {}
    batch: list[tuple[str, Prepared | RecordError]] = []

    def finish() -> None:
        shared = iter(share([p for _, p in batch if not isinstance(p, RecordError)]))
        for source, prepared in batch:
            try:
                if isinstance(prepared, RecordError):
                    raise prepared
                result = build(prepared, next(shared))
            except RecordError as error:
                problems.setdefault(f"{source}: {error}", error)
                continue
            if result is not None:
                results.append(result)
        batch.clear()

    records = Records(reading, purpose)
    for source, record, found in records:
        if limit is not None and len(results) >= limit:
            break
        try:
            if isinstance(found, RecordError):
                raise found
            batch.append((source, prepare(found, record)))
        except RecordError as error:
            batch.append((source, error))
        room = BATCH_SIZE if limit is None else limit - len(results)
        if len(batch) >= min(room, BATCH_SIZE):
            finish()
    finish()
    records.note()
    _judge(reading, purpose, problems, records.count)
    return results


def _judge(
    reading: Reading, purpose: Purpose, problems: dict[str, RecordError], count: int
) -> None:
    """Raise UserError of problems, or note which records are left out.

    Args:
        problems: By place and message.
        count: Records read.
    """
    if reading.bad_records == "drop_empty":
        empty = [said for said, error in problems.items() if isinstance(error, EmptyAnswer)]
        if empty and len(empty) * EMPTY_SHARE <= count:
            places = ", ".join(
                said.removesuffix(f": {problems[said]}") for said in empty[:MAX_PLACES])
            rest = f" and {len(empty) - MAX_PLACES} more" if len(empty) > MAX_PLACES else ""
            reading.notes.append(
                f"warning: {len(empty)} of {count} records have an empty answer and are left out "
                f"(data.bad_records=error refuses them): {places}{rest}")
            problems = {said: e for said, e in problems.items() if said not in set(empty)}
    if problems and reading.bad_records != "drop":
        advice = dict.fromkeys(e.advice for e in problems.values() if e.advice)
        if purpose in ("demonstration", "preference") and len(problems) < count:
            advice["data.bad_records=drop leaves such records out."] = None
        raise UserError(_describe(list(problems), " ".join(advice)))
    if problems:
        reading.notes.append(f"data.bad_records=drop: {_describe(list(problems))}")


def _describe(problems: list[str], advice: str = "") -> str:
    if len(problems) == 1:
        return problems[0] + (f". {advice}" if advice else "")
    rest = len(problems) - MAX_SHOWN
    lines = [f"{len(problems)} records cannot be used:", *problems[:MAX_SHOWN]]
    lines += [f"... and {rest} more"] if rest > 0 else []
    return "\n  ".join(lines) + (f"\n{advice}" if advice else "")
