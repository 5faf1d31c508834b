"""The durable store of a run's pairs: Parquet chunks, committed by rename."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import TEMPORARY_PATTERN, replacing
from megatron_irl.types import Demonstration, Pair

FORMAT_VERSION = 2

_TOKEN_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema({
    "round": pa.int32(),
    "chunk": pa.int32(),
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
_REFERENCES = ["ref_demo_logp", "ref_sample_logp"]
_REWARDS = ["reward_demo", "reward_sample"]
# Columns by format version. Version 1 had no explicit rewards; they are read as not computed.
_COLUMNS = {
    1: [name for name in SCHEMA.names if name not in _REWARDS],
    2: SCHEMA.names,
}


class PairBank:
    """Pairs of every round under ``<root>/round_NNNN/chunk_NNNNN.parquet``.

    A chunk exists whole or not at all, so a run killed at any instant goes on from the chunks it
    committed. The files hold no trace of the parallel layout. Log-probabilities are float32, as
    they are computed: what comes back is what was written. Any rank may read; one may write.
    """

    def __init__(self, root: str | Path, seed: int | None = None) -> None:
        """Open the bank; nothing is read or created yet.

        Args:
            root: The run's ``pairs`` folder; created by the first write.
            seed: The run's seed. Recorded in every chunk, and compared on reading unless None.
        """
        self.root = Path(root)
        self.seed = seed

    def write_chunk(self, round: int, chunk: int, pairs: Sequence[Pair]) -> None:
        """Commit a chunk, replacing an earlier version (to add references or rewards).

        Raises:
            UserError: The disk is full or the folder cannot be written; nothing is left behind.
        """
        metadata = {"format_version": str(FORMAT_VERSION)}
        if self.seed is not None:
            metadata["seed"] = str(self.seed)
        table = _to_table(round, chunk, pairs).replace_schema_metadata(metadata)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        with replacing(self._chunk_path(round, chunk)) as file:
            file.write(buffer.getvalue())

    def read_chunk(self, round: int, chunk: int) -> list[Pair]:
        """Return the pairs of a committed chunk, in the order written.

        Raises:
            UserError: The chunk is not there, is damaged, or belongs to a run of another seed.
        """
        return list(_to_pairs(self._read(round, chunk)))

    def complete_chunks(self, round: int) -> list[int]:
        """Return the numbers of the committed chunks, ascending."""
        names = (re.fullmatch(r"chunk_(\d+)\.parquet", p.name) for p in _list(self._folder(round)))
        return sorted(int(match[1]) for match in names if match)

    def keep_chunks_of(
        self, round: int, parts: Sequence[Sequence[Demonstration]]
    ) -> list[int]:
        """Remove chunks that are not of these demonstrations; return the numbers of the others.

        A held-out set may change while a run is stopped; what was sampled for another one is not
        to be taken for samples of this one.

        Args:
            parts: By chunk, the demonstration of every pair in order.
        """
        kept = []
        for chunk in self.complete_chunks(round):
            expected = parts[chunk] if chunk < len(parts) else []
            pairs = self.read_chunk(round, chunk)
            if len(pairs) == len(expected) and all(map(_is_of, pairs, expected)):
                kept.append(chunk)
            else:
                self._chunk_path(round, chunk).unlink()
        return kept

    def read_round(self, round: int) -> list[Pair]:
        """Return all pairs of a round, chunk by chunk.

        Raises:
            UserError: A chunk is missing among the committed ones, or unreadable.
        """
        return [pair for chunk in self.whole_round(round) for pair in self.read_chunk(round, chunk)]

    def whole_round(self, round: int) -> list[int]:
        """Return the numbers of the committed chunks of a round whose generation has ended.

        Raises:
            UserError: A chunk is missing among them.
        """
        chunks = self.complete_chunks(round)
        missing = sorted(set(range(max(chunks, default=0) + 1)) - set(chunks))
        if missing:
            raise UserError(f"{self._folder(round)} lacks chunks {missing}. Resume the run that "
                            "wrote it, or delete the folder to generate the round again.")
        return chunks

    def has_references(self, round: int) -> bool:
        """Return whether the round has chunks, and every pair in them both reference values."""
        chunks = self.complete_chunks(round)
        tables = (self._read(round, chunk, _REFERENCES) for chunk in chunks)
        return bool(chunks) and not any(c.null_count for t in tables for c in t.columns)

    def discard_after(self, round: int) -> None:
        """Remove the rounds after ``round`` (-1: all) and leftovers of killed writes.

        For resuming: what a checkpoint does not know of is drawn again.
        """
        for folder in _list(self.root):
            match = re.fullmatch(r"round_(\d+)", folder.name)
            if match and int(match[1]) > round:
                shutil.rmtree(folder)
        self.clean()

    def clean(self) -> None:
        """Remove leftovers of killed writes. For the writing rank, while it is not writing."""
        for leftover in self.root.glob(f"round_*/{TEMPORARY_PATTERN}"):
            leftover.unlink()

    def _folder(self, round: int) -> Path:
        return self.root / f"round_{round:04d}"

    def _chunk_path(self, round: int, chunk: int) -> Path:
        return self._folder(round) / f"chunk_{chunk:05d}.parquet"

    def _read(self, round: int, chunk: int, columns: list[str] | None = None) -> pa.Table:
        path = self._chunk_path(round, chunk)
        try:
            # One file, not a dataset: folder names are not to become columns.
            with pq.ParquetFile(path) as file:
                self._check(path, file.schema_arrow)
                return file.read(columns)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; the chunk was never committed.") from error
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read: {error}. Delete it to generate it "
                            "again.") from error

    def _check(self, path: Path, schema: pa.Schema) -> None:
        metadata = schema.metadata or {}
        version, seed = metadata.get(b"format_version"), metadata.get(b"seed")
        if schema.names != _COLUMNS.get(int(version) if version and version.isdigit() else 0):
            raise UserError(f"{path} is not a pair chunk of format_version="
                            f"{' or '.join(map(str, _COLUMNS))}; it was written by another "
                            "version. Start a new output_dir.")
        if self.seed is not None and seed is not None and int(seed) != self.seed:
            raise UserError(f"seed={self.seed} conflicts with seed={int(seed)} of {path}; a run "
                            "goes on with the seed it began with. Set seed back, or start a new "
                            "output_dir.")


def chunk_seed(seed: int, round: int, chunk: int) -> int:
    """Return the sampling seed of a chunk, in [0, 2**31).

    A pure function, the same on every machine, so an interrupted generation resumes to the same
    samples.
    """
    words = np.random.SeedSequence(seed, spawn_key=(round, chunk)).generate_state(1, np.uint32)
    return int(words[0]) >> 1  # 31 bits: whatever takes a seed takes this


def usable_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, int]]:
    """Leave out pairs that cannot teach: an empty sample, or a sample equal to the demonstration.

    A sample of nothing but EOS is empty. An equal sample has zero gradient under every pair loss.

    Returns:
        The usable pairs, in order, and the counts ``duplicates``, ``empty`` and ``usable``.
    """
    counts = {"duplicates": 0, "empty": 0, "usable": 0}
    usable: list[Pair] = []
    for pair in pairs:
        # A sample that stopped ends with EOS, whichever id that is.
        num_text_tokens = len(pair.sample_ids) - (pair.finish_reason == "stop")
        if num_text_tokens <= 0:
            counts["empty"] += 1
        elif np.array_equal(pair.sample_ids, pair.demo_ids):
            counts["duplicates"] += 1
        else:
            counts["usable"] += 1
            usable.append(pair)
    return usable, counts


def _is_of(pair: Pair, demonstration: Demonstration) -> bool:
    return np.array_equal(pair.prompt_ids, demonstration.prompt_ids) and np.array_equal(
        pair.demo_ids, demonstration.response_ids
    )


def _to_table(round: int, chunk: int, pairs: Sequence[Pair]) -> pa.Table:
    def each(name: str) -> list[Any]:
        return [getattr(pair, name) for pair in pairs]

    columns = {
        "round": [round] * len(pairs),
        "chunk": [chunk] * len(pairs),
        "truncated": [pair.finish_reason == "length" for pair in pairs],
        "demo_length": [len(pair.demo_ids) for pair in pairs],
        "sample_length": [len(pair.sample_ids) for pair in pairs],
    }
    arrays = []
    for column in SCHEMA:
        values = columns[column.name] if column.name in columns else each(column.name)
        # from_pandas=False keeps a NaN a NaN: only None is "not computed yet".
        arrays.append(pa.array(values, type=column.type, from_pandas=False))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _to_pairs(table: pa.Table) -> Iterator[Pair]:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for i in range(table.num_rows):
        # Copies: a view of Arrow's memory is read-only and would keep the whole chunk alive.
        lists = {name: np.array(columns[name][i].values)
                 for name in ("prompt_ids", "demo_ids", "sample_ids", "sample_logprobs")}
        scalars = {name: columns[name][i].as_py()
                   for name in ("ordinal", "finish_reason", "round", *_REFERENCES, *_REWARDS)
                   if name in columns}
        yield Pair(**lists, **scalars)


def _list(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
