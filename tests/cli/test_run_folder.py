"""A run folder that was hurt while the run was stopped: found and named, or made whole again."""

import json
import shutil

import pytest
import yaml

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.storage.lease import Lease
from tests.cli.conftest import KEYS
from tests.cli.harness import deterministic, read_jsonl, refused, run, snapshot, write_recipe
from tests.cli.test_resume import Killed, kill_after, pairs_of, small

SAVE = "megatron_irl.run.run.Run.save"


@pytest.fixture(scope="module")
def stopped(model, data, tmp_path_factory):
    """Runs killed at the round's start and within its steps; each made once, copied for a test."""
    from tests.cli.conftest import small_recipe

    known = {}

    def make(where, to):
        if where not in known:
            root = tmp_path_factory.mktemp("stopped")
            mapping = small_recipe(model, data, root / "run")
            # On disk when ``save`` returns: these runs are killed right after it.
            mapping["checkpoint"] = {"interval": 1, "asynchronous": False}
            recipe = write_recipe(root / "recipe.yaml", **mapping)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
                if where == "within a round":
                    kill_after(patch, SAVE, 4, after=True)  # steps 1 and 2, the round's end, step 3
                else:
                    kill_after(patch, "megatron_irl.run.loop.optimizer_step", 3, after=False)
                run("train", recipe)
            known[where] = root / "run", mapping
        folder, mapping = known[where]
        shutil.copytree(folder, to)
        recipe = write_recipe(to.parent / "recipe.yaml", **mapping | {"output_dir": str(to)})
        return to, recipe

    return make


def assert_whole(folder, finished):
    assert deterministic(folder) == deterministic(finished)
    assert pairs_of(folder, 2) == pairs_of(finished, 2)
    weights = "hf/model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def flip(path):
    """Change a sampled token, in a file that stays sound Parquet and says it is unchanged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        table = file.read()
    ids = table["sample_ids"].to_pylist()
    ids[0][0] ^= 1
    index = table.column_names.index("sample_ids")
    column = pa.array(ids, table.schema.field(index).type)
    pq.write_table(table.set_column(index, table.schema.field(index), column), path)


def delete(path):
    path.unlink()


def delete_folder(path):
    shutil.rmtree(path.parent)


HURT = {"bit flipped": flip, "last part deleted": delete, "round deleted": delete_folder}


@pytest.mark.parametrize("name", HURT)
def test_pairs_hurt_before_the_rounds_first_step_are_sampled_again(
    stopped, finished, tmp_path, no_report, name
):
    folder, recipe = stopped("at the round's start", tmp_path / "run")
    HURT[name](folder / "pairs" / "round_0001" / "part_00002.parquet")
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert_whole(folder, finished)


@pytest.mark.parametrize("name", HURT)
def test_pairs_hurt_within_a_round_are_named(stopped, tmp_path, no_report, name):
    folder, recipe = stopped("within a round", tmp_path / "run")
    HURT[name](folder / "pairs" / "round_0001" / "part_00002.parquet")
    before = read_jsonl(folder / "metrics.jsonl")
    named = "round_0001" if name == "round deleted" else "part_00002.parquet"
    refused("train", recipe, named=(named, "checkpoints/"))
    assert read_jsonl(folder / "metrics.jsonl") == before
    assert list(folder.glob("lease.*")) == []


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_identity_is_restored_from_the_recipe(stopped, finished, tmp_path, no_report, damage):
    folder, recipe = stopped("within a round", tmp_path / "run")
    identity = folder / "run.json"
    before = json.loads(identity.read_text())
    identity.write_bytes(identity.read_bytes()[:20])
    if damage == "gone":
        identity.unlink()
    refused("train", recipe, "seed=9", named=("seed=3 there and 9 now",))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert json.loads(identity.read_text()) == before | {"finished": True}
    assert_whole(folder, finished)


@pytest.mark.parametrize("damage", ["last line cut", "last line gone", "gone"])
def test_the_log_is_brought_level_with_the_checkpoint(
    stopped, finished, tmp_path, no_report, damage
):
    folder, recipe = stopped("within a round", tmp_path / "run")
    path = folder / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    assert len(before) == 3
    path.write_bytes(b"".join([*before[:-1], before[-1][:9] if damage == "last line cut" else b""]))
    if damage == "gone":
        path.unlink()
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert_whole(folder, finished)
    assert path.read_bytes().splitlines(keepends=True)[:3] == before


def test_another_recipe_is_refused_by_key(stopped, tmp_path):
    folder, recipe = stopped("within a round", tmp_path / "run")
    before = snapshot(folder)
    refused("train", recipe, "algorithm.beta=0.2", "optimizer.lr=2e-3", named=(
        "belongs to another recipe", "algorithm.beta=[0.1, 0.1] there and [0.2, 0.2] now",
        "optimizer.lr=0.001 there and 0.002 now",
    ))
    assert snapshot(folder) == before


def test_a_run_begun_before_a_key_existed_goes_on(stopped, finished, tmp_path, no_report):
    """Its recipe.yaml lacks the key, and its fingerprint is of a version that had not the key."""
    folder, recipe = stopped("within a round", tmp_path / "run")
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    del written["schedule"]["min_lr_ratio"], written["train"]["logprob_rows"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
    identity = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(identity | {"fingerprint": "of another version"}))
    refused("train", recipe, "schedule.min_lr_ratio=0.5", named=("schedule.min_lr_ratio",))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert_whole(folder, finished)


def test_chunks_of_the_first_release_are_taken_over(stopped, finished, tmp_path, no_report):
    """A round in its steps, as 0.1.0 left it: chunks, no plan, no manifest."""
    from tests.unit.data.test_bank_manifest import old_chunk

    folder, recipe = stopped("within a round", tmp_path / "run")
    for bank in (folder / "pairs", folder / "heldout"):
        reader = PairBank(bank)
        for number in reader.rounds():
            root = bank / f"round_{number:04d}"
            parts = {part: reader.read_part(number, part) for part in reader.parts(number)}
            for path in [*root.glob("part_*"), root / "plan.json", root / "manifest.json"]:
                path.unlink(missing_ok=True)
            for part, pairs in parts.items():
                old_chunk(root, part, pairs, seed=3, round=number)
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert_whole(folder, finished)
    assert list(folder.rglob("chunk_*")) == []


def test_a_run_that_lost_its_folder_writes_nothing_more(
    sections, tmp_path, monkeypatch, no_report
):
    """Another process takes over in the middle; as after a stop longer than the lease."""
    from megatron_irl.run import loop
    from megatron_irl.storage import lease as module

    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    monkeypatch.setattr(module, "FRESH_SECONDS", -1.0)
    original, folder = loop.optimizer_step, tmp_path / "run"
    seen = {}

    def step(run, *rest):
        if run.state.step == 1:
            (held,) = folder.glob("lease.*.json")
            other = json.loads(held.read_text()) | {"token": "another", "pid": 1}
            (folder / "lease.000002.json").write_text(json.dumps(other))
            seen.update(snapshot(folder))
        return original(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", step)
        refused("train", recipe, named=("was taken over by process 1", "writes nothing more"))
    after = snapshot(folder)
    assert after.keys() - seen.keys() == set()
    assert {n for n in seen if n in after and after[n][1] != seen[n][1]} == set()


def test_a_live_folder_is_refused_before_anything_is_read(stopped, tmp_path):
    folder, recipe = stopped("within a round", tmp_path / "run")
    lease = Lease.acquire(folder)
    try:
        refused("train", recipe, "model.hf=/nowhere", named=("in use by process", str(folder)))
    finally:
        lease.release()


def test_a_run_folder_is_as_private_as_the_umask_says(finished):
    """Nobody else may write there, and no file is more closed than its neighbours."""
    import os

    umask = os.umask(0o077)
    os.umask(umask)
    for path in (finished, *finished.rglob("*")):
        if "wandb" in path.parts or path.is_symlink():
            continue
        mode = path.stat().st_mode & 0o777
        assert mode & umask == 0, path
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_lines_of_phases_say_whose_records_they_are_about(finished):
    """The reference pass of held-out pairs too, which comes first in a round."""
    said = (finished.parent / "output.txt").read_text()
    phases = [line.rpartition("  ")[0].split("  ")[0] for line in said.splitlines()
              if "generation " in line or "reference pass " in line]
    assert phases[:2] == ["held out: generation 5/5 responses",
                          "held out, greedy: generation 3/3 responses"]  # a part of 3, and one of 2
    assert "training: generation 8/8 responses" in phases
    for about in ("held out", "training"):
        assert any(line.startswith(f"{about}: reference pass ") for line in phases)
    assert all(line.startswith(("held out", "training: ")) for line in phases), phases


def test_keys_of_trackers_are_in_nothing_that_a_run_writes(finished):
    written = [finished.parent / "output.txt",
               *(path for path in finished.rglob("*") if path.is_file())]
    assert any("wandb" in path.parts for path in written) and len(written) > 20
    for path in written:
        for key in KEYS.values():
            assert key.encode() not in path.read_bytes(), path


def test_keys_in_a_command_are_not_kept():
    from megatron_irl.run.folder import describe_environment

    words = ["train", "r.yaml", "WANDB_API_KEY=abc", "data.tokenizer=here", "hf_token=abc"]
    assert describe_environment(words)["command"] == [
        "train", "r.yaml", "WANDB_API_KEY=***", "data.tokenizer=here", "hf_token=***"]
