"""A byte flipped, a file cut, a file deleted: every kind of file in the folder of a killed run.

What the next start of the run does is in ``TABLE``. There are three right answers: the damage makes
no difference ("same"); it is named and the run ends bitwise as it would have ("named"); it is named
and the start refused with code 2 ("refused"). A run that ends with code 0 is compared with the
uninterrupted one, so a wrong result is none of them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import small_recipe
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe
from tests.cli.test_resume import Killed, kill_after

PREFERENCES = [
    {"prompt": [{"role": "user", "content": f"{a}+1"}], "chosen": str(a + 1), "rejected": "x"}
    for a in range(4)
]
# path in the run folder -> what a byte flipped, half of the file, and no file lead to
NEWEST = "checkpoints/step_000007"
TABLE: dict[str, tuple[str, str, str]] = {
    f"{NEWEST}/__0_0.distcp": ("named", "named", "named"),
    f"{NEWEST}/.metadata": ("named", "named", "named"),
    f"{NEWEST}/metadata.json": ("named", "named", "named"),
    f"{NEWEST}/manifest.json": ("named", "named", "same"),
    "checkpoints/step_000006/__0_0.distcp": ("same", "same", "same"),
    "pairs/round_0000/part_00000.parquet": ("same", "same", "same"),
    "pairs/round_0001/part_00000.parquet": ("refused", "refused", "refused"),
    "pairs/round_0001/manifest.json": ("refused", "refused", "same"),
    "pairs/round_0001/plan.json": ("same", "same", "same"),
    "pairs/round_0001/summary.json": ("named", "named", "same"),
    "ledger/round_0001.parquet": ("refused", "refused", "refused"),
    "metrics.jsonl": ("same", "same", "same"),
    "rounds.jsonl": ("same", "same", "same"),
    "run.json": ("same", "same", "same"),
    "recipe.yaml": ("same", "same", "same"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
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
    }
    sections["evaluation"] = {"interval": "never"}
    recipe = write_recipe(root / "recipe.yaml", **sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
        assert run("train", recipe).code == 0
        with pytest.raises(Killed):
            kill_after(patch, "megatron_irl.storage.checkpoint.Checkpointer.poll", 10, after=True)
            run("train", recipe, f"output_dir={root / 'killed'}", "checkpoint.asynchronous=false")
    return root / "killed", root / "whole", recipe


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("path", TABLE)
def test_damage(runs, tmp_path, no_report, path, damage):
    killed, whole, recipe = runs
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    DAMAGES[damage](folder / path)
    result = run("train", recipe, f"output_dir={folder}")
    expected = TABLE[path][list(DAMAGES).index(damage)]
    assert "Traceback" not in result.err
    if result.code == 0:
        assert deterministic(folder) == deterministic(whole)
        assert len(read_jsonl(folder / "rounds.jsonl")) == 2
        for name in ("hf", "hf_reward"):
            for file in (whole / name).glob("*.safetensors"):
                assert (folder / name / file.name).read_bytes() == file.read_bytes()
    is_named = Path(path).name in result.err
    found = "refused" if result.code == 2 else "named" if is_named else "same"
    assert is_named or result.code == 0
    assert found == expected, result.err[-1500:]


def test_the_table_has_every_kind_of_file(runs):
    """A kind is a folder without its numbers, and a name likewise."""
    def kind(path: str) -> str:
        return "".join(c for c in path if not c.isdigit())

    killed = runs[0]
    there = {kind(str(p.relative_to(killed))) for p in killed.rglob("*") if p.is_file()}
    assert there - {kind(path) for path in TABLE} == set()
