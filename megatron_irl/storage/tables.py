"""JSON lines → Parquet, with the columns that fit all of them."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_irl.storage.commit import replacing

ROWS = 1000  # in memory at a time


def write_parquet_of_lines(lines: Path, path: Path) -> None:
    """Commit a JSON lines file as Parquet; it appears whole or not at all.

    Fields that a line lacks are null. A field whose values have no type in common (numbers here,
    lists there), or one that Parquet does not have, is written as the JSON of each value.

    Raises:
        UserError: The disk is full or the path cannot be written.
    """
    schema, as_json = _schema(lines)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for records in _batches(lines):
            columns = [_column([r.get(f.name) for r in records], f.type, f.name in as_json)
                       for f in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _schema(lines: Path) -> tuple[pa.Schema, set[str]]:
    """The columns that fit all lines, and which of them hold the JSON of their values."""
    types: dict[str, pa.DataType | None] = {}
    not_text: set[str] = set()
    for records in _batches(lines):
        for name in dict.fromkeys(key for record in records for key in record):
            values = [record.get(name) for record in records]
            found = _type(values)
            types[name] = _common(types[name], found) if name in types else found
            if any(value is not None and not isinstance(value, str) for value in values):
                not_text.add(name)
    schema = pa.schema({name: _kept(found) for name, found in types.items()})
    # Of the whole file and not by batch: every value of a column reads back the same way.
    return schema, {f.name for f in schema if pa.types.is_string(f.type)} & not_text


def _type(values: list[Any]) -> pa.DataType | None:
    """The type of a column; None: there is no one type."""
    try:
        return pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None


def _common(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    if one is None or other is None:
        return None
    try:
        both = [pa.schema({"x": each}) for each in (one, other)]
        return pa.unify_schemas(both, promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _kept(found: pa.DataType | None) -> pa.DataType:
    return pa.string() if found is None or _has_empty_struct(found) else found


def _has_empty_struct(found: pa.DataType) -> bool:
    if pa.types.is_struct(found) and found.num_fields == 0:
        return True
    return any(_has_empty_struct(found.field(i).type) for i in range(found.num_fields))


def _column(values: list[Any], wanted: pa.DataType, as_json: bool) -> pa.Array:
    if as_json:
        values = [None if v is None else json.dumps(v) for v in values]
    if pa.types.is_string(wanted):  # an unpaired surrogate has no UTF-8
        values = [v if v is None else v.encode("utf-8", "replace").decode() for v in values]
    return pa.array(values, type=wanted)


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    with open(lines, "rb") as file:
        while batch := [json.loads(line) for line in islice(file, ROWS)]:
            yield batch
