"""Pairs as an Arrow table, and the digest that says a part of the bank is what was written.

The digest is of the values, not of the file's bytes: another version of the Parquet library may
lay the same values out differently, and a flipped bit that reaches no value does no harm.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_irl.types import Pair

FORMAT_VERSION = 3

_TOKEN_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema({
    "round": pa.int32(),
    "part": pa.int32(),
    "ordinal": pa.int64(),
    "prompt_ids": _TOKEN_IDS,
    "demo_ids": _TOKEN_IDS,
    "sample_ids": _TOKEN_IDS,
    "sample_logprobs": pa.list_(pa.float32()),
    "finish_reason": pa.string(),
    "truncated": pa.bool_(),
    "demo_length": pa.int32(),
    "sample_length": pa.int32(),
    "ref_demo_logp": pa.float32(),
    "ref_sample_logp": pa.float32(),
    "reward_demo": pa.float32(),
    "reward_sample": pa.float32(),
})
REFERENCES = ("ref_demo_logp", "ref_sample_logp")
REWARDS = ("reward_demo", "reward_sample")
# What was sampled, as opposed to what is added to it later. These never change once written.
SAMPLED = ("round", "ordinal", "prompt_ids", "demo_ids", "sample_ids", "sample_logprobs",
           "finish_reason")
_ADDED = tuple(name for name in SCHEMA.names if name not in SAMPLED)
_OLD = ["chunk" if name == "part" else name for name in SCHEMA.names]
# Columns by format version. Release 0.1.0 wrote versions 1 (without explicit rewards, which are
# read as not computed) and 2, had another name for a part, and kept no digests.
COLUMNS = {
    1: [name for name in _OLD if name not in REWARDS],
    2: _OLD,
    FORMAT_VERSION: SCHEMA.names,
}


@dataclass(frozen=True)
class Part:
    """What is known of one part of a round without reading it.

    Attributes:
        number: From 0, in the order of the round's prompts.
        rows: Pairs in it.
        samples: Digest of what was sampled; the same in every later version of the part.
        content: Digest of every value.
        references, rewards: Whether every pair has its reference values, its rewards.
    """

    number: int
    rows: int
    samples: str
    content: str
    references: bool = False
    rewards: bool = False

    @classmethod
    def of(cls, number: int, table: pa.Table) -> "Part":
        """Describe a table with the columns of ``SCHEMA``."""
        samples = _digest(table, SAMPLED)
        return cls(
            number, table.num_rows, samples, _digest(table, _ADDED, begin=samples),
            *(not any(table[name].null_count for name in names) for names in (REFERENCES, REWARDS)),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def to_table(round: int, part: int, pairs: Sequence[Pair]) -> pa.Table:
    """The pairs of a part as rows, in order, with the columns of ``SCHEMA``."""
    columns = {
        "round": [round] * len(pairs),
        "part": [part] * len(pairs),
        "truncated": [pair.finish_reason == "length" for pair in pairs],
        "demo_length": [len(pair.demo_ids) for pair in pairs],
        "sample_length": [len(pair.sample_ids) for pair in pairs],
    }
    arrays = []
    for column in SCHEMA:
        if column.name in columns:
            values = columns[column.name]
        else:
            values = [getattr(pair, column.name) for pair in pairs]
        # from_pandas=False keeps a NaN a NaN: only None is "not computed yet".
        arrays.append(pa.array(values, type=column.type, from_pandas=False))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def to_pairs(table: pa.Table) -> Iterator[Pair]:
    """The rows of a table of any format version as pairs; rewards it has not are None."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for i in range(table.num_rows):
        # Copies: a view of Arrow's memory is read-only and would keep the whole part alive.
        lists = {name: np.array(columns[name][i].values)
                 for name in ("prompt_ids", "demo_ids", "sample_ids", "sample_logprobs")}
        scalars = {name: columns[name][i].as_py()
                   for name in ("ordinal", "finish_reason", "round", *REFERENCES, *REWARDS)
                   if name in columns}
        yield Pair(**lists, **scalars)


def _digest(table: pa.Table, names: Sequence[str], begin: str = "") -> str:
    """SHA-256, in hex, of the values of columns: lengths, nulls and little-endian numbers.

    It depends on neither the file's layout nor the library's version.
    """
    known = hashlib.sha256(begin.encode())
    for name in names:
        column = table[name].combine_chunks()
        known.update(f"{name}:{len(column)};".encode())
        if pa.types.is_list(column.type):
            known.update(_bytes(column.value_lengths()))
            column = column.flatten()
        elif pa.types.is_string(column.type):
            known.update(_bytes(pa.array([len(v or "") for v in column.to_pylist()], pa.int32())))
            known.update("".join(v or "" for v in column.to_pylist()).encode())
            continue
        known.update(_bytes(column.is_null()))
        if column.null_count:
            column = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
        known.update(_bytes(column))
    return known.hexdigest()


def _bytes(column: pa.Array) -> bytes:
    values = column.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
