"""The Parquet file of one part of a round: written with its own digest, read against it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_irl.data.pair_table import COLUMNS, FORMAT_VERSION, SCHEMA, Part, to_table
from megatron_irl.errors import UserError
from megatron_irl.types import Pair

MANIFEST = "manifest.json"

_REMEDY = (
    "Restore the file if you have a copy. Otherwise delete it and start the run again: before the "
    "round's first step it is sampled again to the same; later only an older checkpoint helps "
    "(remove the newer ones under checkpoints/)."
)


def part_file(
    round: int, part: int, pairs: Sequence[Pair], seed: int | None
) -> tuple[Part, pa.Buffer]:
    """What describes a part, and the bytes of its file, which hold that description too.

    One file, committed by one rename: there is no instant at which the values and their digest
    could be of different versions.
    """
    table = to_table(round, part, pairs)
    entry = Part.of(part, table)
    metadata = {"format_version": str(FORMAT_VERSION), "part": json.dumps(entry.to_json())}
    if seed is not None:
        metadata["seed"] = str(seed)
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return entry, buffer.getvalue()


def described(path: Path) -> Part | None:
    """What the file says of its part, without reading its rows; None if it says nothing."""
    try:
        return Part(**json.loads(pq.read_schema(path).metadata[b"part"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None  # of 0.1.0, or damaged


def read_part_file(path: Path, seed: int | None, known: Part | None = None) -> pa.Table:
    """The rows of a part, with today's columns, verified by the digest that the file carries.

    Args:
        seed: The run's, compared with the file's unless None.
        known: What the round's manifest says of the part, compared too.

    Raises:
        UserError: The file is missing, damaged, another one than the manifest speaks of, of
            another seed or of another version of the format.
    """
    try:
        # One file, not a dataset: folder names are not to become columns.
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            version = _check(path, schema, seed)
            table = file.read()
        if version < FORMAT_VERSION:  # release 0.1.0 kept no digests
            return _like_now(table)
        said = Part(**json.loads(schema.metadata[b"part"]))
        is_whole = Part.of(said.number, table) == said
    except UserError:
        raise
    except FileNotFoundError as error:
        if known is None:
            raise UserError(f"{path} does not exist; the part was never committed.") from error
        raise UserError(f"{path} does not exist, but {MANIFEST} beside it has it with {known.rows} "
                        f"pairs. {_REMEDY}") from error
    except Exception as error:  # a damaged file can make its reader stumble over anything
        said = str(error).rstrip(".")
        raise UserError(f"{path} cannot be read: {said}. {_REMEDY}") from error
    if not is_whole:
        raise UserError(f"{path} is damaged: its values are not those that were written. {_REMEDY}")
    if known is not None and said != known:
        raise UserError(f"{path} is not the file that {MANIFEST} beside it speaks of: it has "
                        f"digest {said.content[:16]} and {said.rows} pairs, not "
                        f"{known.content[:16]} and {known.rows}. {_REMEDY}")
    return table


def _check(path: Path, schema: pa.Schema, seed: int | None) -> int:
    """The format version. Raises UserError unless it is one of ours, and of this run's seed."""
    metadata = schema.metadata or {}
    given, written = metadata.get(b"format_version"), metadata.get(b"seed")
    version = int(given) if given and given.isdigit() else 0
    has_digest = b"part" in metadata or version < FORMAT_VERSION
    if schema.names != COLUMNS.get(version) or not has_digest:
        raise UserError(f"{path} is not a part of pairs of format_version="
                        f"{' or '.join(map(str, COLUMNS))}; it was written by another version. "
                        "Start a new output_dir.")
    if seed is not None and written is not None and int(written) != seed:
        raise UserError(f"seed={seed} conflicts with seed={int(written)} of {path}; a run goes on "
                        "with the seed it began with. Set seed back, or start a new output_dir.")
    return version


def _like_now(table: pa.Table) -> pa.Table:
    """A table of release 0.1.0 with today's columns."""
    table = table.rename_columns(["part" if n == "chunk" else n for n in table.column_names])
    for name in SCHEMA.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.float32()))
    return table.select(SCHEMA.names).cast(SCHEMA)
