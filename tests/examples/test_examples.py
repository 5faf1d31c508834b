"""Every example is whole: recipes parse, job scripts are valid shell, no file is an orphan."""

import subprocess
from pathlib import Path

import pytest

from megatron_irl.config import check_layout, load_recipe, recipe_from_mapping, resolve
from tests.examples.plans import PLANS, planned, row

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(p for p in (ROOT / "examples").iterdir() if p.is_dir())
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
JOBS = sorted((ROOT / "examples").rglob("*.slurm"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_parses_and_resolves(path):
    recipe = load_recipe(path, [], check_files=False)
    assert check_layout(recipe, None) >= 1
    resolved = resolve(recipe, 1000)
    assert resolved.algorithm.steps_per_round
    assert resolve(resolved, 1000) == resolved


@pytest.mark.parametrize("path", JOBS, ids=lambda p: str(p.relative_to(ROOT)))
def test_job_script_is_valid_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    if path.parent.name != "slurm":  # resources of its own, and the one script for the work
        assert text.rstrip().endswith(". examples/slurm/job.slurm")
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=USR1@" in text
        recipe = text.split("RECIPE:-")[1].split("}")[0]
        assert (ROOT / recipe).exists()
        return
    assert "srun" in text and "megatron-irl" in text and "train \"$RECIPE\"" in text


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda p: p.name)
def test_no_orphans(folder):
    readme = (folder / "README.md").read_text()
    assert list(folder.glob("*.yaml")), "an example without a recipe"
    for path in folder.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert path.name in readme, f"{path.name} is not mentioned in the example's README"


@pytest.mark.parametrize("one", PLANS, ids=lambda one: f"{one.path}-{one.gpus}")
def test_recipe_plans_clean(one):
    """On the GPUs it is for, with any packs; and the README's line is what the planner says.

    ``python -m tests.examples.plans`` writes the lines anew.
    """
    plan = planned(one)
    assert plan.always_fits, plan.verdict()
    readme = (ROOT / "examples" / one.path.split("/")[0] / "README.md").read_text()
    assert row(one, plan) in readme


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    for target in ("demo", "test", "benchmark", "check"):
        assert f"make {target}" in readme and f"\n{target}:" in makefile


def test_llama_70b_says_which_loss_is_ln2():
    """The recipe has an anchor, so the whole loss starts above ln 2."""
    folder = ROOT / "examples" / "llama_70b"
    recipe = load_recipe(folder / "recipe.yaml", [], check_files=False)
    assert recipe.algorithm.nll_coefficient == 0.1
    assert "`loss/margin` is ln 2" in (folder / "README.md").read_text()


def test_pythia_passes_are_what_the_comments_say():
    path = ROOT / "examples" / "pythia_rft" / "recipe.yaml"
    recipe = load_recipe(path, [], check_files=False)
    algorithm, batch = recipe.algorithm, recipe.train.global_batch_size
    pairs = algorithm.prompts_per_round * recipe.policy.samples_per_prompt
    text = path.read_text()
    assert f"one pass over round 0's {pairs} pairs" in text
    assert algorithm.reward_steps * batch == pairs
    assert f"two passes over the round's {pairs} samples" in text
    assert algorithm.policy_steps * batch == 2 * pairs
    assert f"later rounds have {pairs * (1 + recipe.reward.mix_rounds)}" in text


def test_unknown_recipe_key_fails():
    with pytest.raises(ValueError, match="rounds"):
        recipe_from_mapping(
            {"model": {"hf": "x"}, "data": {"train": "y"}, "output_dir": "z",
             "algorithm": {"name": "irft", "round": 2}}
        )
