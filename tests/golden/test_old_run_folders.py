"""Run folders that an earlier release left when it was killed are finished by the code of today.

``killed/*.tar.xz`` were written by release 0.1.0 (see ``killed.py``): folders of runs killed in the
middle of a round, with what the release itself makes of the same recipe when nobody kills it.
"""

import json
import tarfile
from pathlib import Path

import pytest

from megatron_irl.config import fingerprint, load_recipe, resolve
from megatron_irl.errors import UserError
from megatron_irl.run.folder import RunFolder
from tests.golden import ranks
from tests.golden.compare import compare, describe_mode
from tests.golden.killed import RUN, saved_step
from tests.golden.record import train
from tests.golden.trajectory import read_trajectory

ARCHIVES = sorted(Path(__file__).with_name("killed").glob("*.tar.xz"))


def unpack(archive, to):
    with tarfile.open(archive) as file:
        file.extractall(to, filter="data")
    return to / archive.name.removesuffix(".tar.xz")


def test_there_are_folders_of_both_algorithms():
    names = {archive.name.removesuffix(".tar.xz") for archive in ARCHIVES}
    assert {"irft_in_steps", "rft_in_policy_steps", "irft_in_generation"} <= names


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.split(".")[0])
def test_a_killed_run_is_finished_as_the_release_would_have(archive, pool, tmp_path):
    folder = unpack(archive, tmp_path)
    expected = json.loads((folder / "expected.json").read_text())
    exact = describe_mode(expected["environment"], pool.run(1, ranks.environment)[0])
    saved = expected["steps_saved"]
    assert saved_step(folder / RUN) == saved > 0
    assert not (folder / RUN / "hf").exists()
    kept = (folder / RUN / "metrics.jsonl").read_bytes().splitlines()[:saved]

    given, _ = RunFolder(folder / RUN).as_begun(
        load_recipe(folder / "recipe.yaml", check_files=False))
    assert (given.algorithm.nll_coefficient == 0.0) == archive.name.startswith("irft")

    train(pool, 1, folder / "recipe.yaml")

    found = compare(expected["trajectory"], read_trajectory(folder / RUN), exact=exact)
    # A request that was decoded alone had other last bits in the release; see generation/skinny.py.
    # Losses and weights, which rft makes of them, are compared as they are.
    expected_bits = "other logps of the samples"
    assert [line for line in found.differences if not line.endswith(expected_bits)] == []
    recorded = load_recipe(folder / RUN / "recipe.yaml", check_files=False)
    assert recorded.algorithm.nll_coefficient == given.algorithm.nll_coefficient
    # Clock readings and all: these steps were not done again.
    assert (folder / RUN / "metrics.jsonl").read_bytes().splitlines()[:saved] == kept


def test_another_anchor_than_the_release_had_is_named(tmp_path):
    """Recipes of irft that are silent about it mean 0.3 now; folders of before go on with 0."""
    folder = unpack(next(a for a in ARCHIVES if a.name.startswith("irft_in_steps")), tmp_path)
    run, path = RunFolder(folder / RUN), folder / "recipe.yaml"
    kept, notes = run.as_begun(load_recipe(path, check_files=False))
    assert notes == ["algorithm.nll_coefficient is 0, as this run began; a run that begins now "
                     "has 0.3."]
    data = json.loads((run.path / "run.json").read_text())["data"]
    run.check(resolve(kept, 24), data, 24, {})
    said, none = run.as_begun(
        load_recipe(path, ["algorithm.nll_coefficient=0.3"], check_files=False))
    assert none == []
    with pytest.raises(UserError, match=r"algorithm.nll_coefficient=0.0 there and 0.3 now. Set "):
        run.check(resolve(said, 24), data, 24, {})


def test_a_folder_that_lost_its_recipe_goes_on_with_its_anchor_too(tmp_path):
    folder = unpack(next(a for a in ARCHIVES if a.name.startswith("irft_in_steps")), tmp_path)
    run, silent = RunFolder(folder / RUN), load_recipe(folder / "recipe.yaml", check_files=False)
    kept, notes = run.as_begun(silent)
    known = {"demonstrations": 24, "fingerprint": fingerprint(resolve(kept, 24))}
    (run.path / "run.json").write_text(json.dumps(known))
    (run.path / "recipe.yaml").unlink()
    assert run.as_begun(silent) == (kept, notes)
    other = load_recipe(folder / "recipe.yaml", ["algorithm.beta=0.7"], check_files=False)
    assert run.as_begun(other) == (other, [])
