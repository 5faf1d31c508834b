"""A byte flipped, a file cut, a file deleted: every kind of file in the folder of a killed run.

There are three right answers of the next start: it makes no difference, it is named and the run
ends bitwise as it would have, or it is named and refused with code 2. ``docs/checkpoints.md`` has
the table. Pairs within a round in progress are in ``test_run_folder.py``.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_irl.data.ledger import read_ledger
from megatron_irl.errors import UserError
from megatron_irl.storage.damage import damage
from tests.cli.conftest import small_recipe
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe
from tests.cli.test_resume import Killed, kill_after

NEWEST = "checkpoints/step_000007"
ALONE = SimpleNamespace(rank=0, world_size=1, is_main=True)
# What is made again, has a second source, or is not read any more: all of it damaged at once.
MADE_GOOD = (
    "metrics.jsonl", "rounds.jsonl", "run.json", "pairs/round_0001/plan.json",
    "pairs/round_0000/part_00000.parquet", "checkpoints/step_000006/__0_0.distcp",
    "tokens/*/train.arrow", "tokens/*/eval.arrow", "tokens/*/preferences.arrow",
    "tokens/*/eval_preferences.arrow", "tokens/*/corpus.json",
)


def flip(path: Path, at: float = 0.5) -> None:
    """The middle byte's lowest bit: of JSON that is often another number."""
    content = bytearray(path.read_bytes())
    if content:
        content[int(len(content) * at)] ^= 0x01
        path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "delete": Path.unlink}


@pytest.fixture(scope="module")
def runs(model, data, tmp_path_factory):
    """The folders of a run killed in its second round and of the same run unkilled; its recipe."""
    root = tmp_path_factory.mktemp("damage")
    sections = small_recipe(model, data, root / "whole") | {
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 2, "policy_steps": 3,
                      "beta": 0.05},
        "reward": {"lr": 1e-2}, "checkpoint": {"interval": 1, "keep": 2},
        "evaluation": {"interval": "never"},
    }
    recipe = write_recipe(root / "recipe.yaml", **sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
        assert run("train", recipe).code == 0
        with pytest.raises(Killed):
            kill_after(patch, "megatron_irl.run.loop.between_steps", 8, after=False)
            run("train", recipe, f"output_dir={root / 'killed'}", "checkpoint.asynchronous=false")
    return root / "killed", root / "whole", recipe


def start(runs, folder: Path):
    """The next start on a damaged copy; what ends with code 0 must be the uninterrupted run."""
    _, whole, recipe = runs
    result = run("train", recipe, f"output_dir={folder}")
    assert "Traceback" not in result.err
    if result.code == 0:
        assert deterministic(folder) == deterministic(whole)
        assert round_lines(folder) == round_lines(whole)
        assert ledgers(folder) == ledgers(whole)
        for name in ("hf", "hf_reward"):
            for file in (whole / name).glob("*.safetensors"):
                assert (folder / name / file.name).read_bytes() == file.read_bytes()
    return result


def round_lines(folder: Path):
    """The rounds without clock readings."""
    return [
        [line["round"], line["step"], line["guard"], line["generation"].get("samples"),
         line["generation"].get("tokens"), line.get("mismatch")]
        for line in read_jsonl(folder / "rounds.jsonl")
    ]


def ledgers(folder: Path):
    return [read_ledger(folder / "ledger", round) for round in (0, 1)]


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_made_good(runs, tmp_path, no_report, how):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    for pattern in MADE_GOOD:
        paths = list(folder.glob(pattern))
        assert len(paths) == 1, pattern
        DAMAGES[how](paths[0])
    assert start(runs, folder).code == 0


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "manifest.json"])
def test_a_damaged_checkpoint_is_found_and_the_file_named(runs, tmp_path, how, name):
    checkpoint = tmp_path / "step_000007"
    shutil.copytree(runs[0] / NEWEST, checkpoint)
    assert damage(checkpoint, "hashes", ALONE) is None
    DAMAGES[how](checkpoint / name)
    said = damage(checkpoint, "hashes", ALONE)
    if (how, name) == ("delete", "manifest.json"):
        assert said is None  # as a checkpoint of 0.1.0: what is read is whole
    else:
        assert said is not None and str(checkpoint / name) in said
    seen_by_size = damage(checkpoint, "sizes", ALONE) is not None
    assert seen_by_size == (said is not None and (how != "flip" or name == "manifest.json"))


def test_a_checkpoint_without_a_manifest_is_compared_with_its_own_metadata(runs, tmp_path):
    for name in ("__0_0.distcp", ".metadata", "metadata.json"):
        checkpoint = tmp_path / name / "step_000007"
        shutil.copytree(runs[0] / NEWEST, checkpoint)
        (checkpoint / "manifest.json").unlink()
        cut(checkpoint / name)
        said = damage(checkpoint, "sizes", ALONE)
        assert said is not None and name in said


def test_the_older_checkpoint_is_taken_and_the_newer_named(runs, tmp_path, no_report):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    flip(folder / NEWEST / "__0_0.distcp")
    result = start(runs, folder)
    assert result.code == 0, result.err
    assert f"{NEWEST}/__0_0.distcp is damaged" in result.err and "resuming at step 6" in result.err


def test_without_an_intact_checkpoint_nothing_is_begun_anew(runs, tmp_path, no_report):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    flip(folder / NEWEST / "__0_0.distcp")
    (folder / "checkpoints/step_000006/.metadata").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    result = start(runs, folder)
    assert result.code == 2
    assert "__0_0.distcp" in result.err and "step_000006/.metadata is missing" in result.err
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_ledger_is_named_by_who_reads_it(runs, tmp_path, how):
    shutil.copytree(runs[1] / "ledger", tmp_path / "ledger")
    path = tmp_path / "ledger" / "round_0001.parquet"
    # In the data: of so small a file they are the first third, and what follows has no checksum.
    cut(path) if how == "cut" else flip(path, at=0.2)
    with pytest.raises(UserError, match="round_0001.parquet cannot be read"):
        read_ledger(tmp_path / "ledger", 1)


def test_a_damaged_summary_is_named(runs, tmp_path, no_report):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    flip(folder / "pairs/round_0001/summary.json")
    result = run("train", runs[2], f"output_dir={folder}")
    assert result.code == 0 and "summary.json is missing or damaged" in result.err
    assert deterministic(folder) == deterministic(runs[1])
