"""Rows of token ids in an Arrow file that every process of a machine maps instead of holding.

A file has one row per demonstration or preference. What is read of it are pages of the file, which
the system keeps once however many ranks use them; a row becomes an object when it is asked for.
"""

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.ipc

from megatron_irl.data.preferences import Preference
from megatron_irl.types import Demonstration

IDS, BYTES = pyarrow.list_(pyarrow.int32()), pyarrow.binary()
# Texts are bytes: JSON can spell an unpaired surrogate, which Arrow's strings refuse.
DEMONSTRATIONS = pyarrow.schema({
    "prompt_ids": IDS, "response_ids": IDS, "loss_mask": BYTES, "prompt": BYTES,
    "response": BYTES, "answer": BYTES, "source": BYTES,
})
PREFERENCES = pyarrow.schema({
    "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "source": BYTES,
})
_PROMPT = json.JSONEncoder(default=str)
BATCH_ROWS = 8192  # of a record batch at most, and
BATCH_TOKENS = 1 << 22  # so many tokens, for the writer's memory


class TableWriter:
    """Writes rows one after another, holding one batch of them; a context manager."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        self._schema, self._tokens = schema, 0
        self._rows: list[tuple[Any, ...]] = []
        self._file = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._file, schema)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:  # a table that failed is thrown away, not finished
                self._flush()
            self._writer.close()
        finally:
            self._file.close()

    def demonstration(self, each: Demonstration) -> None:
        """Append one; its ordinal is its row."""
        mask = None if each.loss_mask is None else each.loss_mask.astype(bool).tobytes()
        prompt = _PROMPT.encode(each.prompt)
        self._add(each.prompt_ids, each.response_ids, mask, prompt.encode(),
                  _bytes(each.response), _bytes(each.answer), _bytes(each.source))

    def preference(self, each: Preference) -> None:
        """Append one."""
        self._add(each.prompt_ids, each.chosen_ids, each.rejected_ids, _bytes(each.source))

    def _add(self, *row: Any) -> None:
        self._rows.append(row)
        self._tokens += len(row[0]) + len(row[1])  # of preferences the greater part
        if len(self._rows) >= BATCH_ROWS or self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pyarrow.array(column, type=field.type)
                      for column, field in zip(columns, self._schema, strict=True)]
            self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
            self._rows, self._tokens = [], 0


class MappedRows[T](Sequence[T]):
    """A sequence of a file's rows, each made when it is asked for.

    A slice, or a choice of rows, is another sequence of the same file and copies nothing.

    Args:
        batches: The file's.
        make: (its columns, row in the file, row in the batch) -> what a row is.
        rows: Which rows, in order; None: all.
        count: As ``make``, the tokens of a row's prompt and of each of its responses.
    """

    def __init__(
        self, batches: "Batches", make: Callable[["Batch", int, int], T],
        rows: range | np.ndarray | None = None,
        count: Callable[["Batch", int, int], tuple[int, ...]] | None = None,
    ) -> None:
        self._batches, self._make, self._count = batches, make, count
        self._rows: range | np.ndarray = range(batches.count) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "MappedRows[T]": ...
    def __getitem__(self, index: int | slice) -> "T | MappedRows[T]":
        if isinstance(index, slice):
            return MappedRows(self._batches, self._make, self._rows[index], self._count)
        return self._at(int(self._rows[index]))

    def __iter__(self) -> Iterator[T]:
        return (self._at(int(row)) for row in self._rows)

    def chosen(self, indices: Sequence[int]) -> "MappedRows[T]":
        """These of the sequence, in this order."""
        rows = np.asarray(self._rows)[np.asarray(indices, np.int64)]
        return MappedRows(self._batches, self._make, rows, self._count)

    def token_counts(self, *, share_prompts: bool) -> list[int]:
        """Of every row, the tokens a step processes (``data.stored.Stored``)."""
        assert self._count is not None, "rows of something else than training items"
        return [prompt * (1 if share_prompts else len(responses)) + sum(responses)
                for prompt, *responses in self.of_each(self._count)]

    def keep(self, indices: Sequence[int]) -> None:
        """Nothing to do: the system keeps the pages that are in use."""

    @property
    def rows(self) -> np.ndarray:
        """int64: the rows of the file, which for demonstrations are their ordinals."""
        return np.asarray(self._rows, np.int64)

    def of_each[U](self, make: Callable[["Batch", int, int], U]) -> "MappedRows[U]":
        """The same rows as something else: less of them than ``make`` reads."""
        return MappedRows(self._batches, make, self._rows)

    def _at(self, row: int) -> T:
        batch, start = self._batches.of(row)
        return self._make(batch, row, row - start)


class Batch:
    """The columns of a record batch: ids as views of the mapped file, bytes as copies."""

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        self._ids: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._bytes: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if isinstance(column, pyarrow.ListArray):
                self._ids[name] = (column.offsets.to_numpy(),
                                   column.values.to_numpy(zero_copy_only=True))
            else:
                self._bytes[name] = column

    def ids(self, name: str, row: int) -> np.ndarray:
        """int32 ids, not to be written to."""
        offsets, values = self._ids[name]
        return values[offsets[row] : offsets[row + 1]]

    def bytes_of(self, name: str, row: int) -> bytes | None:
        """A copy."""
        return self._bytes[name][row].as_py()

    def text(self, name: str, row: int) -> str:
        """Text that is always there."""
        return (self.bytes_of(name, row) or b"").decode("utf-8", "surrogatepass")


class Batches:
    """The record batches of a mapped file; opened as they are needed, then kept."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        # Mapped, so that ranks share the pages, and open for as long as the rows are used: a file
        # that is removed meanwhile (another corpus took its place) stays readable.
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        if self._reader.schema != schema:
            raise pyarrow.ArrowInvalid(f"{path} has other columns")
        counts = [self._reader.get_batch(i).num_rows
                  for i in range(self._reader.num_record_batches)]
        self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self._open: list[Batch | None] = [None] * len(counts)

    @property
    def count(self) -> int:
        """Rows of the file."""
        return self._starts[-1]

    def of(self, row: int) -> tuple[Batch, int]:
        """The batch a row of the file is in, and the batch's first row."""
        index = bisect.bisect_right(self._starts, row) - 1
        batch = self._open[index]
        if batch is None:
            batch = self._open[index] = Batch(self._reader.get_batch(index))
        return batch, self._starts[index]


def demonstrations_in(path: Path) -> MappedRows[Demonstration]:
    """The demonstrations of a file that ``TableWriter`` wrote."""
    lengths = _lengths("prompt_ids", "response_ids")
    return MappedRows(Batches(path, DEMONSTRATIONS), _demonstration, count=lengths)


def preferences_in(path: Path) -> MappedRows[Preference]:
    """As ``demonstrations_in``, of preferences."""
    lengths = _lengths("prompt_ids", "chosen_ids", "rejected_ids")
    return MappedRows(Batches(path, PREFERENCES), _preference, count=lengths)


def ids_of(demonstrations: Sequence[Demonstration]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompt and response ids of each, without reading the texts of mapped ones."""
    if isinstance(demonstrations, MappedRows):
        yield from demonstrations.of_each(lambda batch, _, place: (
            batch.ids("prompt_ids", place), batch.ids("response_ids", place)))
    else:
        yield from ((d.prompt_ids, d.response_ids) for d in demonstrations)


def ordinals_of(demonstrations: Sequence[Demonstration]) -> list[int]:
    """The ordinal of each; of mapped ones nothing is read."""
    if isinstance(demonstrations, MappedRows):
        return demonstrations.rows.tolist()
    return [d.ordinal for d in demonstrations]


def masks_of(demonstrations: Sequence[Demonstration]) -> Iterator[np.ndarray | None]:
    """As ``ids_of``, the loss masks."""
    if isinstance(demonstrations, MappedRows):
        yield from demonstrations.of_each(lambda batch, _, place: _mask(batch, place))
    else:
        yield from (d.loss_mask for d in demonstrations)


def _demonstration(batch: Batch, row: int, place: int) -> Demonstration:
    answer = batch.bytes_of("answer", place)
    return Demonstration(
        row, batch.ids("prompt_ids", place), batch.ids("response_ids", place),
        json.loads(batch.text("prompt", place)), batch.text("response", place),
        None if answer is None else answer.decode("utf-8", "surrogatepass"),
        batch.text("source", place), _mask(batch, place),
    )


def _mask(batch: Batch, place: int) -> np.ndarray | None:
    mask = batch.bytes_of("loss_mask", place)
    return None if mask is None else np.frombuffer(mask, bool)


def _preference(batch: Batch, row: int, place: int) -> Preference:
    del row
    ids = [batch.ids(name, place) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return Preference(*ids, source=batch.text("source", place))


def _lengths(*names: str) -> Callable[[Batch, int, int], tuple[int, ...]]:
    return lambda batch, _, place: tuple(len(batch.ids(name, place)) for name in names)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")
