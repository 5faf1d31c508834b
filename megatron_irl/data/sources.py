"""Sources of records: which files, how often, which share; and what was recognised in them."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from megatron_irl.config.data_schema import BadRecords
from megatron_irl.config.schema import DataConfig, DataSource
from megatron_irl.data.compression import kind_of
from megatron_irl.data.conversation import Conversation
from megatron_irl.data.formats import Normaliser
from megatron_irl.data.forms import Purpose
from megatron_irl.data.readers import TABLES, RecordError, Row, as_object, delimiter_of, read_rows
from megatron_irl.data.trees import assembled, is_tree_row
from megatron_irl.errors import UserError

MAX_NOTES = 12  # files spelled out in the log
SHOWN = 60  # characters of a message in the log

Paths = str | Path | DataSource | Iterable[str | Path | DataSource]


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Attributes:
        sources: Files, or sources with a weight, a limit or a form of their own.
        format, fields: As in ``DataConfig``; a source's own win.
        part: Which records: ``all``, or where a share is held out, the ``held_out`` or the rest.
        fraction: The share held out.
        seed: Decides which records are held out, and which a weight takes.
        bad_records: ``drop`` leaves unusable records out and names them; ``drop_empty`` those
            that have no answer, and only if they are few.
        notes: Gets a line for every file: what was recognised in it.
    """

    sources: tuple[str | Path | DataSource, ...]
    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    part: Literal["all", "rest", "held_out"] = "all"
    fraction: float = 0.0
    seed: int = 0
    bad_records: BadRecords = "error"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, paths: "Paths | Reading") -> "Reading":
        """A reading of files, without anything particular."""
        if isinstance(paths, Reading):
            return paths
        return cls((paths,) if isinstance(paths, str | Path | DataSource) else tuple(paths))

    def __str__(self) -> str:
        return ", ".join(map(str, self.sources))


def training_reading(data: DataConfig, notes: list[str]) -> Reading:
    """The demonstrations to train on: ``data.train`` without what is held out."""
    part, fraction = ("rest", data.split.eval) if data.split else ("all", 0.0)
    return Reading(data.train, data.format, data.fields, part, fraction, _seed(data),
                   data.bad_records, notes)


def evaluation_reading(data: DataConfig, notes: list[str]) -> Reading | None:
    """The held-out demonstrations: ``data.eval``, or the share of ``data.train``; None: neither."""
    if data.split:
        # Each record once, whatever its weight: a measurement is not weighed by training.
        sources = tuple(replace(s, weight=1.0) if isinstance(s, DataSource) else s
                        for s in data.train)
        return Reading(sources, data.format, data.fields, "held_out", data.split.eval, _seed(data),
                       data.bad_records, notes)
    if not data.eval:
        return None
    return Reading(data.eval, data.format, data.fields, seed=_seed(data),
                   bad_records=data.bad_records, notes=notes)


def _seed(data: DataConfig) -> int:
    return data.split.seed if data.split else 0


@dataclass
class _Seen:
    """What was recognised in one file, as one source of it says."""

    path: str
    counts: dict[str, int] = field(default_factory=dict)
    first: Conversation | None = None


class Records:
    """The records of a reading, one after another.

    Args:
        reading: What to read.
        purpose: What for.

    Attributes:
        count: Records read so far, those of the other part of a split included.
    """

    def __init__(self, reading: Reading, purpose: Purpose) -> None:
        self._reading: Reading = reading
        self._purpose: Purpose = purpose
        self._seen: list[_Seen] = []
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], list[Conversation] | RecordError]]:
        """Yield (source, record, what it says or why it is unusable).

        Raises:
            UserError: A file is missing, empty or unreadable.
        """
        for source in self._reading.sources:
            if not isinstance(source, DataSource):
                source = DataSource((str(source),))
            yield from self._of_source(source)

    def _of_source(self, source: DataSource) -> Iterator[tuple[str, dict[str, Any], Any]]:
        normaliser = Normaliser(self._purpose, source.format or self._reading.format,
                                source.fields if source.fields else self._reading.fields)
        left = math.inf if source.limit is None else source.limit
        draws = source.weight != 1 or self._reading.part != "all"
        for path in source.path:
            if left <= 0:
                return
            # Of its own each time: two sources may read one file by other fields, or a part of it.
            self._seen.append(seen := _Seen(path))
            place = None
            for place, raw in _with_trees(read_rows(Path(path))):
                if left <= 0:
                    break
                left -= 1
                self.count += 1
                times = 1
                record: dict[str, Any] = {}
                try:
                    record = as_object(raw)
                    if draws:
                        times = self._times(record, source.weight)
                        if not times:
                            continue
                    form, found = normaliser.read(record, place)
                except RecordError as error:
                    if not record and self._reading.part == "held_out":
                        continue  # what has no content to decide by is reported with the rest
                    found = error
                else:
                    name = form.description
                    seen.counts[name] = seen.counts.get(name, 0) + 1
                    if seen.first is None:
                        seen.first = found[0]
                yield place, record, found
                for _ in range(times - 1):
                    yield place, record, found
            if place is None:
                raise UserError(f"{path}: the file has no records.")

    def _times(self, record: dict[str, Any], weight: float) -> int:
        """How often a record is taken: decided by its content, so that no other matters."""
        text = json.dumps(record, sort_keys=True, default=str)
        key = f"{self._reading.seed} ".encode() + text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key, digest_size=16).digest()
        # Two independent numbers in [0, 1): a weight must not prefer what is not held out.
        share, draw = (int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8))
        part = self._reading.part
        if part != "all" and (share < self._reading.fraction) != (part == "held_out"):
            return 0
        whole = math.floor(weight)
        return whole + (draw < weight - whole)

    def note(self) -> None:
        """Add what was recognised to the reading's notes: a line for every file of a source."""
        lines = [f"{seen.path}: {_table(Path(seen.path))}{_counted(seen)}"
                 for seen in self._seen if seen.counts]
        if len(lines) > MAX_NOTES:
            rest = len(lines) - MAX_NOTES
            forms = sorted({name for seen in self._seen for name in seen.counts})
            lines[MAX_NOTES:] = [f"... and {rest} more files; in all of them: {'; '.join(forms)}"]
        self._reading.notes.extend(lines)


def _with_trees(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, those of message trees put together."""
    first = next(rows, None)
    if first is None:
        return iter(())
    try:
        has_trees = is_tree_row(as_object(first[1]))
    except RecordError:
        has_trees = False
    rows = chain([first], rows)
    return assembled(rows) if has_trees else rows


def _table(path: Path) -> str:
    """Of a table whose name says other than its header does what was taken."""
    usual = TABLES.get(kind_of(path))
    if usual is None or path.is_dir() or (taken := delimiter_of(path)) == usual:
        return ""
    return f"cells separated by {'semicolons' if taken == ';' else 'tabs'}, "


def _counted(seen: _Seen) -> str:
    forms = ", ".join(f"{count} records as {name}" for name, count in seen.counts.items())
    if seen.first is None:
        return forms
    turns = [f"{m['role']} {_short(m['content'] or str(m.get('tool_calls', '')))}"
             for m in seen.first.messages]
    if len(turns) > 3:
        turns[1:-2] = ["..."]
    return f"{forms}; the first: {' | '.join(turns)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
