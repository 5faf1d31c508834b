"""Folders of the Hugging Face cache: snapshots of links into blobs."""

import hashlib

import pytest

from megatron_irl.config import hub_snapshot, load_recipe
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert import jobs
from tests.convert.test_round_trip import assert_same_weights
from tests.convert.tiny import make_tiny_llama

OLD, NEW = "0" * 40, "a1" * 20


@pytest.fixture
def cached(tmp_path):
    """A repository as huggingface_hub lays it out: one snapshot, its files links into blobs/."""
    plain = make_tiny_llama(tmp_path / "plain", layers=2, hidden=32)
    repository = tmp_path / "hub" / "models--tiny--llama"
    snapshot = repository / "snapshots" / NEW
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for path in plain.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        (repository / "blobs" / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    (repository / "refs" / "main").write_text(NEW)
    return plain, repository, snapshot


def test_the_snapshot_that_is_meant(cached):
    plain, repository, snapshot = cached
    assert hub_snapshot(plain) == plain
    assert hub_snapshot(snapshot) == snapshot
    assert hub_snapshot(repository) == snapshot
    (repository / "snapshots" / OLD).mkdir()
    assert hub_snapshot(repository) == snapshot
    (repository / "refs" / "main").write_text("b" * 40)
    with pytest.raises(UserError, match=f"none of its snapshots \\({OLD}, {NEW}\\)"):
        hub_snapshot(repository)
    (repository / "snapshots" / OLD).rmdir()
    assert hub_snapshot(repository) == snapshot


def test_a_recipe_holds_on_to_its_snapshot(cached, tmp_path):
    _, repository, snapshot = cached
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{hf: {repository}}}\ndata: {{train: x.jsonl}}\n"
                      "algorithm: {name: sft, steps_per_round: 1}\noutput_dir: out\n")
    assert load_recipe(recipe, check_files=False).model.hf == str(snapshot)


def test_weights_come_through_links_and_leave_as_files(pool, cached, tmp_path):
    plain, repository, snapshot = cached
    hf_to_megatron(repository, tmp_path / "megatron").run(lambda *_: None)
    back = tmp_path / "back"
    megatron_to_hf(
        tmp_path / "megatron" / "release", back, hf_dir=repository
    ).run(lambda *_: None)
    exported = tmp_path / "hf"
    pool.run(1, jobs.round_trip, hf=str(snapshot), layout={}, out=str(exported))
    for folder in (back, exported):
        assert_same_weights(folder, plain)
        assert not [path for path in folder.iterdir() if path.is_symlink()]
        assert {path.name for path in plain.iterdir()} <= {path.name for path in folder.iterdir()}
