"""The bank survives kills and full disks, and gives back what was written."""

import errno
import os
from dataclasses import replace

import numpy as np
import pandas
import pytest

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_index import counts, index_of, usable_pairs
from megatron_irl.errors import UserError
from megatron_irl.storage import commit
from megatron_irl.types import Demonstration, Pair
from tests.unit.data.pairs import assert_same, make_pairs


@pytest.mark.parametrize("references", [False, True])
def test_round_trip(tmp_path, references):
    pairs = make_pairs(5, seed=1, round=3, references=references)
    pairs[2] = replace(pairs[2], sample_ids=np.array([], np.int32),
                       sample_logprobs=np.array([], np.float32))
    bank = PairBank(tmp_path / "pairs", seed=7)
    bank.write_part(3, 0, pairs[:2])
    bank.write_part(3, 1, pairs[2:])
    assert_same(bank.read_part(3, 1), pairs[2:])
    assert_same(PairBank(tmp_path / "pairs").read_round(3), pairs)
    assert bank.parts(3) == [0, 1] and bank.parts(4) == []
    assert bank.read_part(3, 0)[0].demo_ids.flags.writeable


def test_references_are_added_by_rewriting(tmp_path):
    bank = PairBank(tmp_path)
    pairs = make_pairs(4)
    assert not bank.has_references(0)
    bank.write_part(0, 0, pairs[:2])
    bank.write_part(0, 1, pairs[2:])
    bank.finish_round(0)
    assert not bank.has_references(0)
    bank.write_part(0, 0, [replace(p, ref_demo_logp=-1.5, ref_sample_logp=-2.5)
                            for p in pairs[:2]])
    bank.finish_round(0)
    assert not bank.has_references(0)
    bank.write_part(0, 1, [replace(p, ref_demo_logp=-1.5, ref_sample_logp=float("nan"))
                            for p in pairs[2:]])
    bank.finish_round(0)
    assert bank.has_references(0)
    assert [p.ref_demo_logp for p in bank.read_round(0)] == [-1.5] * 4
    assert np.isnan(bank.read_round(0)[3].ref_sample_logp)


def test_readable_by_pandas(tmp_path):
    pairs = make_pairs(3, round=2)
    PairBank(tmp_path, seed=7).write_part(2, 4, pairs)
    frame = pandas.read_parquet(tmp_path / "round_0002" / "part_00004.parquet")
    assert frame["ordinal"].tolist() == [0, 1, 2]
    assert frame["sample_ids"][1].tolist() == pairs[1].sample_ids.tolist()
    assert frame["truncated"].tolist() == [False, True, False]
    assert frame["sample_length"].tolist() == [len(p.sample_ids) for p in pairs]
    assert frame["demo_length"].tolist() == [len(p.demo_ids) for p in pairs]
    assert frame["ref_demo_logp"].isna().all()
    assert (frame["round"] == 2).all() and (frame["part"] == 4).all()
    assert len(pandas.read_parquet(tmp_path)) == 3  # the whole bank as one dataset


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it."""


def test_killed_before_the_rename(tmp_path, monkeypatch):
    bank = PairBank(tmp_path)
    old, new = make_pairs(2, seed=1), make_pairs(2, seed=2)
    bank.write_part(0, 0, old)

    def kill(source, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(commit, "_remove_quietly", lambda path: None)
        for part in (0, 1):
            with pytest.raises(Killed):
                bank.write_part(0, part, new)
    folder = tmp_path / "round_0000"
    assert len(list(folder.iterdir())) == 3  # one part and two leftovers

    resumed = PairBank(tmp_path)
    assert resumed.parts(0) == [0]
    assert_same(resumed.read_round(0), old)
    resumed.discard_after(0)
    assert os.listdir(folder) == ["part_00000.parquet"]
    resumed.write_part(0, 1, new)
    assert_same(resumed.read_round(0), old + new)


@pytest.mark.parametrize("failing_call", ["fsync", "write", "open"])
def test_disk_full(tmp_path, monkeypatch, failing_call):
    bank = PairBank(tmp_path)
    old = make_pairs(2, seed=1)
    bank.write_part(0, 0, old)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile:
        def __init__(self, *args):
            self._file = open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self._file.close()

        def write(self, data):
            self._file.write(data[:10])
            full()

    with monkeypatch.context() as patch:
        if failing_call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(commit, "open", full if failing_call == "open" else FullFile,
                          raising=False)
        for part in (0, 1):
            with pytest.raises(UserError, match="No space left") as raised:
                bank.write_part(0, part, make_pairs(2, seed=2))
            assert str(tmp_path / "round_0000" / f"part_0000{part}.parquet") in str(raised.value)
    assert os.listdir(tmp_path / "round_0000") == ["part_00000.parquet"]
    assert_same(bank.read_round(0), old)


def test_discard_after(tmp_path):
    bank = PairBank(tmp_path / "pairs")
    bank.discard_after(0)  # nothing there yet
    for round in range(4):
        bank.write_part(round, 0, make_pairs(1, round=round))
    bank.discard_after(1)
    assert sorted(os.listdir(bank.root)) == ["round_0000", "round_0001"]
    bank.discard_after(-1)
    assert os.listdir(bank.root) == []


def test_what_cannot_be_read_is_said(tmp_path):
    bank = PairBank(tmp_path, seed=7)
    with pytest.raises(UserError, match="does not exist"):
        bank.read_part(0, 0)
    for part in (0, 2):
        bank.write_part(0, part, make_pairs(1))
    with pytest.raises(UserError, match=r"lacks parts \[1\]"):
        bank.read_round(0)
    with pytest.raises(UserError, match="seed=8 conflicts with seed=7"):
        PairBank(tmp_path, seed=8).read_part(0, 0)
    path = tmp_path / "round_0000" / "part_00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot be read: .*[^.]\. Restore the file"):
        bank.read_part(0, 0)
    pandas.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(UserError, match="not a part of pairs"):
        bank.read_part(0, 0)


def test_usable_pairs():
    def pair(ordinal, sample, finish_reason):
        return Pair(ordinal, np.array([1]), np.array([5, 2]), np.array(sample),
                    np.zeros(len(sample)), finish_reason)

    pairs = [
        pair(0, [5, 2], "stop"),  # the demonstration itself
        pair(1, [2], "stop"),  # EOS at once
        pair(2, [], "length"),
        pair(3, [6, 2], "stop"),
        pair(4, [5], "length"),  # cut: one token of text, no EOS
        pair(5, [5, 3], "stop"),  # ended by another stop token
    ]
    assert [p.ordinal for p in usable_pairs(pairs)] == [3, 4, 5]
    assert counts(index_of(pairs)["kind"]) == {"duplicates": 1, "empty": 2, "usable": 3}


def test_explicit_rewards_are_added_later(tmp_path):
    bank, pairs = PairBank(tmp_path), make_pairs(4, references=True)
    bank.write_part(0, 0, pairs)
    assert all(pair.reward_demo is None for pair in bank.read_part(0, 0))
    scored = [replace(p, reward_demo=i / 4, reward_sample=-i / 4) for i, p in enumerate(pairs)]
    bank.write_part(0, 0, scored)
    assert_same(bank.read_round(0), scored)


def test_parts_of_other_demonstrations_are_removed(tmp_path):
    bank, pairs = PairBank(tmp_path), make_pairs(10)
    for part in range(5):
        bank.write_part(0, part, pairs[2 * part : 2 * part + 2])

    def demonstration(pair, **changes):
        same = Demonstration(0, pair.prompt_ids, pair.demo_ids, "", "", None, "")
        return replace(same, **changes)

    parts = [[demonstration(p) for p in pairs[2 * c : 2 * c + 2]] for c in range(4)]
    parts[1][1] = demonstration(pairs[3], response_ids=np.append(pairs[3].demo_ids, np.int32(1)))
    parts[2].pop()
    path = tmp_path / "round_0000" / "part_00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    # another answer, fewer pairs, damaged, no such part
    assert bank.discard_others(0, parts) == bank.parts(0) == [0]
    assert_same(bank.read_part(0, 0), pairs[:2])
