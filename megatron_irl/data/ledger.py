"""The demonstration ledger: what each demonstration's reward was, round by round, as Parquet.

A round's file has the demonstrations that the round sampled for, or all of them; it says which.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_irl.data.records import Messages
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import TEMPORARY_PATTERN, replacing
from megatron_irl.types import Demonstration

FORMAT_VERSION = 1
BLOCK_ROWS = 1 << 14  # written together

SCHEMA = pa.schema({
    "round": pa.int32(),
    "ordinal": pa.int64(),
    "source": pa.string(),
    "digest": pa.string(),
    "prompt_length": pa.int32(),
    "response_length": pa.int32(),
    "reward": pa.float32(),
    "sample_reward": pa.float32(),
})


@dataclass(frozen=True)
class LedgerRow:
    """One demonstration's reward in one round.

    Attributes:
        ordinal: ``Demonstration.ordinal``.
        source: ``file:line`` of the record.
        digest: Of prompt and response, to notice that the file has changed since.
        prompt_length, response_length: Tokens.
        reward: Of the demonstration.
        sample_reward: Of the policy's samples for its prompt, their mean; None if none was drawn.
    """

    ordinal: int
    source: str
    digest: str
    prompt_length: int
    response_length: int
    reward: float
    sample_reward: float | None = None

    @classmethod
    def of(
        cls, demonstration: Demonstration, reward: float, sample_reward: float | None = None
    ) -> "LedgerRow":
        """The row of a demonstration."""
        return cls(
            demonstration.ordinal, demonstration.source,
            record_digest(demonstration.prompt, demonstration.response),
            len(demonstration.prompt_ids), len(demonstration.response_ids), reward, sample_reward,
        )


def record_digest(prompt: str | Messages, response: str) -> str:
    """Sixteen hex digits that change with the text of the record."""
    text = json.dumps([prompt, response], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_ledger(
    folder: Path, round: int, rows: Iterable[LedgerRow], *, is_complete: bool = True
) -> None:
    """Commit a round as ``<folder>/round_NNNN.parquet``, replacing an earlier version.

    The file appears whole or not at all, so a round repeated after a kill ends the same. One
    writer at a time. Rewards are float32, as they are computed.

    Args:
        rows: Taken a block at a time; there may be millions.
        is_complete: Whether every demonstration has its row.

    Raises:
        UserError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    metadata = {"format_version": str(FORMAT_VERSION), "complete": str(is_complete)}
    schema = SCHEMA.with_metadata(metadata)
    with replacing(_path(folder, round)) as file, pq.ParquetWriter(
        file, schema, write_page_checksum=True
    ) as writer:
        for block in itertools.batched(rows, BLOCK_ROWS):
            columns = {f.name: [getattr(row, f.name) for row in block] for f in fields(LedgerRow)}
            columns["round"] = [round] * len(block)
            # from_pandas=False keeps a NaN a NaN: only None is "not there".
            arrays = [pa.array(columns[c.name], type=c.type, from_pandas=False) for c in SCHEMA]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def ledger_rounds(folder: Path) -> list[int]:
    """Return the rounds committed, ascending; none where there is no ledger."""
    names = (re.fullmatch(r"round_(\d+)\.parquet", path.name) for path in folder.glob("*"))
    return sorted(int(match[1]) for match in names if match)


def complete_rounds(folder: Path) -> list[int]:
    """Return the rounds committed that have every demonstration, ascending.

    Raises:
        UserError: A round's file cannot be read.
    """
    return [round for round in ledger_rounds(folder) if _is_complete(_path(folder, round))]


def _is_complete(path: Path) -> bool:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return metadata.get(b"complete") != b"False"  # files of earlier versions do not say: all do


def read_ledger(folder: Path, round: int | None = None) -> list[LedgerRow]:
    """Return the rows of a round (the newest if None), in the order written.

    Raises:
        UserError: There is no such round, or its file cannot be read.
    """
    rounds = ledger_rounds(folder)
    if not rounds or (round is not None and round not in rounds):
        there = f"it has rounds {', '.join(map(str, rounds))}" if rounds else "there is none yet"
        raise UserError(f"{folder} has no ledger of {'any' if round is None else 'that'} round"
                        f"{'' if round is None else f' (round {round})'}; {there}.")
    path = _path(folder, rounds[-1] if round is None else round)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            version = (schema.metadata or {}).get(b"format_version")
            if version != str(FORMAT_VERSION).encode() or schema.names != SCHEMA.names:
                raise UserError(f"{path} is not a ledger of format_version={FORMAT_VERSION}; it "
                                "was written by another version.")
            rows = file.read().drop_columns("round").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    return [LedgerRow(**row) for row in rows]


def discard_ledger_after(folder: Path, round: int) -> None:
    """Remove the rounds after ``round`` (-1: all) and leftovers of killed writes; for resuming."""
    for later in ledger_rounds(folder):
        if later > round:
            _path(folder, later).unlink()
    for leftover in folder.glob(TEMPORARY_PATTERN):
        leftover.unlink()


def _path(folder: Path, round: int) -> Path:
    return folder / f"round_{round:04d}.parquet"
