"""The ledger comes back as written, whole or not at all."""

import errno
import math
import os

import numpy as np
import pandas
import pyarrow.parquet
import pytest

from megatron_irl.data.ledger import (
    LedgerRow,
    complete_rounds,
    discard_ledger_after,
    ledger_rounds,
    read_ledger,
    record_digest,
    write_ledger,
)
from megatron_irl.errors import UserError
from megatron_irl.types import Demonstration


def make_rows(seed: int, count: int = 6) -> list[LedgerRow]:
    rng = np.random.default_rng(seed)
    return [
        LedgerRow(i, f"data/tráin.jsonl:{i + 1}", f"{i:016x}", 7 + i, 3 + i,
                  float(np.float32(rng.normal())),
                  None if i == 2 else float(np.float32(rng.normal())))
        for i in range(count)
    ]


def test_rows_come_back_in_order_and_exactly(tmp_path):
    folder, first, second = tmp_path / "ledger", make_rows(0), make_rows(1)[::-1]
    write_ledger(folder, 0, first)
    write_ledger(folder, 3, second)
    assert ledger_rounds(folder) == [0, 3]
    assert read_ledger(folder, 0) == first
    assert read_ledger(folder) == read_ledger(folder, 3) == second
    assert sorted(p.name for p in folder.iterdir()) == ["round_0000.parquet", "round_0003.parquet"]


def test_pandas_reads_all_rounds_at_once(tmp_path):
    for round_index in range(3):
        write_ledger(tmp_path, round_index, make_rows(round_index))
    frame = pandas.read_parquet(tmp_path)
    assert list(frame["round"]) == [0] * 6 + [1] * 6 + [2] * 6
    means = frame.groupby("round")["reward"].mean()
    assert means[1] == pytest.approx(np.mean([row.reward for row in make_rows(1)]))


def test_a_round_says_whether_it_is_complete(tmp_path):
    for round_index, is_complete in enumerate([False, True, False]):
        write_ledger(tmp_path, round_index, make_rows(0), is_complete=is_complete)
    write_ledger(tmp_path, 3, make_rows(0))
    assert complete_rounds(tmp_path) == [1, 3]
    table = pyarrow.parquet.read_table(tmp_path / "round_0003.parquet")
    older = table.replace_schema_metadata({"format_version": "1"})  # before rounds said so
    pyarrow.parquet.write_table(older, tmp_path / "round_0003.parquet")
    assert complete_rounds(tmp_path) == [1, 3]
    assert complete_rounds(tmp_path / "nowhere") == []
    (tmp_path / "round_0004.parquet").write_text("no")
    with pytest.raises(UserError, match="round_0004.parquet cannot be read"):
        complete_rounds(tmp_path)


def test_a_round_written_again_replaces_the_first(tmp_path):
    write_ledger(tmp_path, 0, make_rows(0))
    write_ledger(tmp_path, 0, make_rows(5))
    assert read_ledger(tmp_path) == make_rows(5)


def test_no_number_is_not_nan(tmp_path):
    rows = [LedgerRow(0, "a:1", "d", 1, 1, math.nan, None)]
    write_ledger(tmp_path, 0, rows)
    (row,) = read_ledger(tmp_path)
    assert math.isnan(row.reward) and row.sample_reward is None


def test_full_disk_leaves_the_earlier_version(tmp_path, monkeypatch):
    write_ledger(tmp_path, 0, make_rows(0))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_ledger(tmp_path, 0, make_rows(1))
    monkeypatch.undo()
    assert read_ledger(tmp_path) == make_rows(0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    write_ledger(tmp_path, 0, make_rows(3))
    (path,) = tmp_path.glob("*.parquet")
    content, expected, found = path.read_bytes(), repr(read_ledger(tmp_path)), 0
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            assert repr(read_ledger(tmp_path)) == expected, f"byte {place}"
        except UserError:
            found += 1
    assert found > len(content) / 7 / 4


def test_resuming_forgets_later_rounds_and_leftovers(tmp_path):
    for round_index in range(3):
        write_ledger(tmp_path, round_index, make_rows(round_index))
    (tmp_path / ".round_0003.parquet.tmp").write_bytes(b"half")
    discard_ledger_after(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["round_0000.parquet"]
    discard_ledger_after(tmp_path / "nowhere", 0)  # nothing to do


def test_missing_rounds_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is none yet"):
        read_ledger(tmp_path / "nowhere")
    write_ledger(tmp_path, 1, make_rows(0))
    with pytest.raises(UserError, match=r"\(round 7\); it has rounds 1\."):
        read_ledger(tmp_path, 7)
    pandas.DataFrame({"reward": [1.0]}).to_parquet(tmp_path / "round_0002.parquet")
    with pytest.raises(UserError, match="round_0002.parquet is not a ledger"):
        read_ledger(tmp_path)
    (tmp_path / "round_0003.parquet").write_bytes(b"garbage")
    with pytest.raises(UserError, match="round_0003.parquet cannot be read"):
        read_ledger(tmp_path)


def test_row_of_a_demonstration():
    ids = np.arange(4, dtype=np.int32)
    demonstration = Demonstration(7, ids, ids[:2], "Q", "A", "ignored", "f.jsonl:8")
    row = LedgerRow.of(demonstration, 0.5, -1.0)
    assert row == LedgerRow(7, "f.jsonl:8", record_digest("Q", "A"), 4, 2, 0.5, -1.0)


def test_digest_follows_the_text_only():
    message = {"role": "user", "content": "Q"}
    assert record_digest([message], "A") == record_digest([dict(reversed(message.items()))], "A")
    others = [record_digest("Q", "A"), record_digest([message], "B"),
              record_digest([message, message], "A"), record_digest("Q ", "A"),
              record_digest("QA", "")]
    assert len({record_digest([message], "A"), *others}) == 6
