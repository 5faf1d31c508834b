"""A round is what its manifest says, or it is refused; old rounds are taken over."""

import json
import os
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from megatron_irl.data.bank_repair import bring_up_to_date, settle
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_table import COLUMNS, to_table
from megatron_irl.errors import UserError
from tests.unit.data.pairs import assert_same, make_pairs

# --- plan and manifest


def finished_bank(root, num=6, size=2, **options):
    bank, pairs = PairBank(root, seed=7), make_pairs(num, **options)
    bounds = [(first, min(first + size, num)) for first in range(0, num, size)]
    for part, (first, last) in enumerate(bank.begin_round(0, bounds)):
        bank.write_part(0, part, pairs[first:last])
    bank.finish_round(0)
    return bank, pairs


def test_the_first_plan_of_a_round_holds(tmp_path):
    bank = PairBank(tmp_path)
    assert bank.begin_round(0, [(0, 4), (4, 6)]) == [(0, 4), (4, 6)]
    bank.write_part(0, 1, make_pairs(2))
    assert bank.begin_round(0, [(0, 3), (3, 6)]) == [(0, 4), (4, 6)]  # another layout
    assert bank.done_parts(0) == [1]
    assert bank.begin_round(0, [(0, 4), (4, 5)]) == [(0, 4), (4, 5)]  # other prompts
    assert bank.done_parts(0) == []
    (tmp_path / "round_0000" / "plan.json").write_text('{"bou')
    assert bank.begin_round(0, [(0, 5)]) == [(0, 5)]


def test_a_round_is_finished_when_every_part_is_there(tmp_path):
    bank, pairs = PairBank(tmp_path), make_pairs(4)
    bank.begin_round(0, [(0, 2), (2, 4)])
    bank.write_part(0, 1, pairs[2:])
    with pytest.raises(UserError, match=r"lacks parts \[0\]"):
        bank.finish_round(0)
    bank.write_part(0, 0, pairs[:2])
    assert [part.rows for part in bank.finish_round(0).values()] == [2, 2]
    said = json.loads((tmp_path / "round_0000" / "manifest.json").read_text())
    assert [part["file"] for part in said["parts"]] == ["part_00000.parquet", "part_00001.parquet"]
    assert said["rows"] == 4 and said["bounds"] == [[0, 2], [2, 4]]


def test_a_deleted_last_part_is_named(tmp_path):
    bank, _ = finished_bank(tmp_path)
    (tmp_path / "round_0000" / "part_00002.parquet").unlink()
    with pytest.raises(UserError, match="part_00002.parquet does not exist, but manifest.json"):
        bank.read_round(0)
    assert "part_00002.parquet does not exist, but manifest.json" in settle(bank, 0)


@pytest.mark.parametrize("column", ["sample_ids", "sample_logprobs", "ref_demo_logp", "ordinal"])
def test_a_changed_value_is_found(tmp_path, column):
    """Another value, in a file that is sound Parquet, as a flipped bit makes it."""
    bank, pairs = finished_bank(tmp_path, references=True)
    path = tmp_path / "round_0000" / "part_00001.parquet"
    table = pq.read_table(path, partitioning=None)
    other = to_table(0, 1, [replace(p, **{column: getattr(p, column) * -1.0 if "log" in column else
                                         getattr(p, column) + 1}) for p in pairs[2:4]])
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, table.schema.field(index), other[column]), path)
    with pytest.raises(UserError, match="part_00001.parquet is damaged") as raised:
        bank.read_round(0)
    assert "sampled again" in str(raised.value)
    assert bank.done_parts(0) == [0, 2]
    assert "part_00001.parquet is damaged" in settle(bank, 0)


def test_every_flipped_byte_of_a_file_is_found_or_harmless(tmp_path):
    bank, pairs = finished_bank(tmp_path, num=3, size=3)
    path = tmp_path / "round_0000" / "part_00000.parquet"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read = bank.read_round(0)
        except UserError as error:
            assert "part_00000.parquet" in str(error)
        else:
            assert_same(read, pairs)


def test_a_file_of_another_time_is_not_taken_for_the_manifests(tmp_path):
    """As a network file system may show: whole in itself, but not what was committed last."""
    bank, pairs = finished_bank(tmp_path)
    path = tmp_path / "round_0000" / "part_00001.parquet"
    old = path.read_bytes()
    bank.write_part(0, 1, [replace(p, ref_demo_logp=-1.0, ref_sample_logp=-2.0)
                           for p in pairs[2:4]])
    bank.finish_round(0)
    path.write_bytes(old)
    with pytest.raises(UserError, match="not the file that manifest.json"):
        bank.read_round(0)


def test_a_kill_between_rewritten_parts_and_their_manifest(tmp_path):
    bank, pairs = finished_bank(tmp_path)
    for pair in pairs:
        pair.ref_demo_logp = pair.ref_sample_logp = -1.5
    for part in (0, 2):
        bank.write_part(0, part, pairs[2 * part : 2 * part + 2])
    assert settle(bank, 0) is None
    assert [part.references for part in bank.manifest(0).values()] == [True, False, True]
    assert not bank.has_references(0)
    bank.write_part(0, 1, make_pairs(2, seed=9))  # other samples: no later version of the part
    assert "part 1 under" in settle(bank, 0)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_manifest_that_is_lost_is_made_again(tmp_path, damage):
    bank, pairs = finished_bank(tmp_path)
    path = tmp_path / "round_0000" / "manifest.json"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match=r"manifest.json cannot be read.*Delete it"):
        bank.read_round(0)
    if damage == "gone":
        path.unlink()
    assert settle(bank, 0) is None
    assert path.read_bytes() == before
    assert_same(bank.read_round(0), pairs)


def test_the_digest_does_not_depend_on_the_files_layout(tmp_path):
    bank, pairs = finished_bank(tmp_path, references=True)
    path = tmp_path / "round_0000" / "part_00000.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table, path, row_group_size=1, compression="zstd", use_dictionary=False)
    assert_same(bank.read_round(0), pairs)


def test_nothing_is_committed_past_the_fence(tmp_path):
    def lost():
        raise UserError("the folder is another run's now")

    bank, pairs = finished_bank(tmp_path)
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "round_0000").iterdir())
    fenced = PairBank(tmp_path, seed=7, fence=lost)
    for act in (lambda: fenced.write_part(0, 0, pairs), lambda: fenced.finish_round(0),
                lambda: fenced.begin_round(0, [(0, 1)]), lambda: fenced.forget(0),
                lambda: fenced.discard_others(0, [])):
        with pytest.raises(UserError, match="another run's"):
            act()
    assert before == sorted((p.name, p.read_bytes()) for p in (tmp_path / "round_0000").iterdir())


# --- rounds of release 0.1.0


def old_chunk(folder, number, pairs, *, version=2, seed=5, round=0):
    """A file as release 0.1.0 wrote it."""
    table = to_table(round, number, pairs).rename_columns(COLUMNS[2])
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format_version": str(version), "seed": str(seed)}
    table = table.select(COLUMNS[version]).replace_schema_metadata(metadata)
    pq.write_table(table, folder / f"chunk_{number:05d}.parquet")


@pytest.mark.parametrize("version", [1, 2])
def test_a_bank_of_the_first_release_is_read_and_brought_up_to_date(tmp_path, version):
    """Version 1 had no rewards: 13 columns."""
    bank, pairs = PairBank(tmp_path, seed=5), make_pairs(6, references=True)
    folder = tmp_path / "round_0000"
    for number in (0, 1):
        old_chunk(folder, number, pairs[3 * number : 3 * number + 3], version=version)
    assert_same(bank.read_round(0), pairs)
    assert bank.parts(0) == bank.done_parts(0) == [0, 1]
    (folder / "summary.json").write_text('{"generation": {"samples": 6}}')
    bring_up_to_date(bank, 0)
    assert sorted(os.listdir(folder)) == [
        "manifest.json", "part_00000.parquet", "part_00001.parquet", "summary.json"]
    assert_same(bank.read_round(0), pairs)
    assert bank.has_references(0)


def test_a_round_of_the_first_release_without_its_last_chunk_is_not_finished(tmp_path):
    bank, pairs = PairBank(tmp_path, seed=5), make_pairs(6, references=True)
    folder = tmp_path / "round_0000"
    old_chunk(folder, 0, pairs[:3])
    (folder / "summary.json").write_text('{"generation": {"samples": 6}}')
    bring_up_to_date(bank, 0)
    assert bank.manifest(0) is None
    assert bank.done_parts(0) == [0]


def test_columns_of_no_version_are_refused(tmp_path):
    old_chunk(tmp_path / "round_0000", 0, make_pairs(3), version=1)
    path = tmp_path / "round_0000" / "chunk_00000.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.replace_schema_metadata({"format_version": "2", "seed": "5"}), path)
    with pytest.raises(UserError, match="format_version=1 or 2 or 3"):
        PairBank(tmp_path, seed=5).read_round(0)
