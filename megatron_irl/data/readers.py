"""The rows of a data file, whatever its kind, each with the place it stands at."""

import csv
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_irl.data.compression import COMPRESSED, kind_of, open_binary
from megatron_irl.data.json_text import (
    array_items,
    is_array,
    is_stream,
    parsed_line,
    stream_values,
)
from megatron_irl.errors import UserError

LINES = {".jsonl", ".ndjson", ".json"}
TABLES = {".csv": ",", ".tsv": "\t"}
ARROW = {".arrow", ".ipc", ".feather"}
SUFFIXES = frozenset({*LINES, *TABLES, *ARROW, ".parquet"})
HEAD = 1 << 20  # bytes looked at to tell one kind of JSON text from another
ROWS = 1000  # of a column file at a time
CONVERT = "Convert it, as in iconv -f {} -t UTF-8 OLD > NEW."
LATIN = "It may be Latin-1 or Windows-1252. " + CONVERT.format("WINDOWS-1252")

Row = tuple[str, Any]
"""(source, record): ``file:line`` or ``file:row N``, and a JSON line as bytes or a value."""


class RecordError(UserError):
    """One record or text is unusable; loaders put file and line before the message.

    Attributes:
        advice: What to do about it and all of its kind; said once, after the messages.
    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class EmptyAnswer(RecordError):
    """A record is as it should be, but nobody answered: public files have some of these."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, or of a folder that ``datasets.save_to_disk`` wrote.

    A row is the bytes of a JSON line, a value already parsed, or the RecordError it is. Blank lines
    are passed over. Lines and rows count from 1. What is read is never held whole, pretty-printed
    JSON and JSON arrays apart.

    Raises:
        UserError: There is no such file, its kind is unknown, or it cannot be read.
    """
    if path.is_dir():
        rows = _read_saved(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such file.")
    else:
        rows = _reader(path)
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_not_utf8(error)}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error,
            pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _reader(path: Path) -> Iterator[Row]:
    kind = kind_of(path)
    if kind in LINES:
        return _read_json(path)
    if kind in TABLES:
        return _read_table(path)
    if kind in (".parquet", *ARROW) and path.suffix.lower() in COMPRESSED:
        raise UserError(f"{path}: a compressed {kind} file. Unpack it; its columns are compressed "
                        "by themselves.")
    if kind == ".parquet":
        return _read_parquet(path)
    if kind in ARROW:
        return _read_arrow(path)
    raise UserError(
        f"{path}: unknown kind of file; use .jsonl (one JSON object a line), .json, .csv or .tsv "
        "(each also .gz or .zst), .parquet, .arrow or a folder of datasets.save_to_disk."
    )


def _read_json(path: Path) -> Iterator[Row]:
    """Lines; or where the beginning says so an array, or values that go over several lines."""
    with closing(open_binary(path)) as file:
        head = file.read(HEAD)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16, JSON is UTF-8. {CONVERT.format('UTF-16')}")
    if is_array(head):
        with closing(open_binary(path)) as file:
            yield from array_items(path, file.read())
    elif is_stream(head):
        with closing(open_binary(path)) as file:
            yield from stream_values(path, file.read())
    else:
        with closing(open_binary(path)) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield f"{path}:{number}", line


def _not_utf8(error: UnicodeDecodeError) -> str:
    """What a text is instead, as far as its bytes say, and what to do."""
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"is UTF-16, not UTF-8. {CONVERT.format('UTF-16')}"
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}). {LATIN}"


def delimiter_of(path: Path) -> str:
    """What separates the cells of a table: that of its kind, or what the header of a .csv has.

    Spreadsheets write semicolons where the comma is a decimal sign. A comma outside of quotes in
    the header is what it says it is.
    """
    if TABLES[kind_of(path)] != ",":
        return TABLES[kind_of(path)]
    with closing(open_binary(path)) as file:
        header = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="").readline()
    return _delimiter_in(header)

def _delimiter_in(header: str) -> str:
    def names(delimiter: str) -> int:
        with _cells_of_any_length():
            return len(next(csv.reader([header], delimiter=delimiter), []))

    other = max(";\t", key=names)
    return other if names(",") < 2 <= names(other) else ","


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Within the block: csv's limit is the process's, and others may count on it."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_table(path: Path) -> Iterator[Row]:
    """Rows of a table with a header line; an empty cell is a field that is not there."""
    delimiter = TABLES[kind_of(path)]
    with closing(open_binary(path)) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        header = text.readline()
        if delimiter == ",":
            delimiter = _delimiter_in(header)
        rows = csv.DictReader(chain([header], text), delimiter=delimiter)
        for number in count(1):
            with _cells_of_any_length():  # not while others do something with a row
                row = next(rows, None)
            if row is None:
                return
            source = f"{path}:row {number}"
            if None in row:
                yield source, RecordError("the row has more cells than the header has names")
            else:
                yield source, {name: cell or None for name, cell in row.items()}


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(batch_size=ROWS))


def _read_arrow(path: Path) -> Iterator[Row]:
    """Arrow's file form, or the stream form that the ``datasets`` library writes."""
    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(path)
            yield from _rows(path, map(reader.get_batch, range(reader.num_record_batches)))
        else:
            file.seek(0)
            yield from _rows(path, pyarrow.ipc.open_stream(file))


def _read_saved(path: Path) -> Iterator[Row]:
    """A folder with one split; which one of several is decided before."""
    try:
        import datasets  # takes a second, and few files need it
    except ImportError:
        raise UserError(f"{path} is a folder of datasets.save_to_disk; install the datasets "
                        "library to read it, or save it with to_parquet.") from None
    saved = datasets.load_from_disk(str(path))
    assert isinstance(saved, datasets.Dataset)
    yield from _rows(path, saved.with_format("arrow").iter(batch_size=ROWS))


def _rows(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", {key: without_nulls(v) for key, v in row.items()}


def without_nulls(value: Any) -> Any:
    """Leave out null fields of objects inside a value.

    A column has one type, so every object in it is given the fields of all of them: a tool's
    arguments would name those of the other tools.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def as_object(raw: Any) -> dict[str, Any]:
    """Return a row as a JSON object.

    Raises:
        RecordError: It is not one.
    """
    if isinstance(raw, bytes):
        try:
            raw = parsed_line(raw.removeprefix(b"\xef\xbb\xbf").decode())
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8: {error}", advice=LATIN) from None
        except json.JSONDecodeError as error:
            if error.msg == "Extra data" and error.doc[error.pos:].strip() == ",":
                raise RecordError("a comma follows the record, which JSON lines do not have",
                                  advice="Remove the commas at the ends of lines.") from None
            raise RecordError(f"not JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise RecordError("not JSON: nested too deeply") from None
    if isinstance(raw, RecordError):
        raise raw
    if not isinstance(raw, dict):
        raise RecordError(f"must be a JSON object, not {kind_name(raw)}")
    return raw


def kind_name(value: Any) -> str:
    """What a JSON value is, in words: for messages."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null",
             bytes: "bytes (write the column as strings)"}
    return names.get(type(value), f"{value!r}")
