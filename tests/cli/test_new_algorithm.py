"""An algorithm that the package has never heard of: one file and one line, nothing else."""

from dataclasses import dataclass

import pytest

from megatron_irl.algorithms import registry
from megatron_irl.algorithms.base import Algorithm, Phase, Work
from megatron_irl.config import algorithm_keys, load_recipe, resolve, to_yaml
from megatron_irl.config.bounds import check_range
from tests.cli.harness import read_jsonl, refused, run, write_recipe


@dataclass(frozen=True)
class SharpenConfig:
    keep: float = 0.5
    """Share of the demonstrations, the shortest ones."""


@dataclass(frozen=True)
class SharpenOptions:
    polish_steps: int = 1


class Sharpen(Algorithm):
    """Imitates all demonstrations, then the shortest ones once more."""

    name = "sharpen"
    draws_samples = False
    reward = "none"
    options = SharpenOptions
    sections = {"sharpen": SharpenConfig}
    unread = {"beta": "it has no reward. Remove algorithm.beta."}

    def check(self, recipe):
        check_range("sharpen.keep", recipe.sharpen.keep, "(0, 1]", 0 < recipe.sharpen.keep <= 1)

    def phases(self, recipe):
        steps, polish = recipe.algorithm.steps_per_round, recipe.algorithm.polish_steps
        return [Phase("all", 0, steps - polish, self.all),
                Phase("polish", steps - polish, steps, self.polish)]

    def all(self, round, step):
        from megatron_irl.algorithms.sft import likelihood_objective

        return Work(round.data.demonstrations, likelihood_objective, outlasts_round=True)

    def polish(self, round, step):
        from megatron_irl.algorithms.sft import likelihood_objective

        shortest = sorted(round.data.demonstrations, key=lambda d: len(d.response_ids))
        kept = shortest[: int(len(shortest) * round.recipe.sharpen.keep)]
        return Work(kept, likelihood_objective, summary={"polished": len(kept)})

    def export(self, policy, run_folder, companions, say):
        (run_folder / "sharpened").write_text(str(policy.architecture.vocab_size))


@pytest.fixture
def registered(monkeypatch):
    def forget():
        for known in (algorithm_keys.own_keys, algorithm_keys.own_sections):
            known.cache_clear()

    monkeypatch.setitem(registry.REGISTRY, "sharpen", f"{__name__}:Sharpen")
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def sections(sections):
    return sections | {
        "algorithm": {"name": "sharpen", "rounds": 2, "steps_per_round": 3, "polish_steps": 2},
        "sharpen": {"keep": 0.25},
    }


def test_it_trains_from_a_recipe_to_its_product(registered, recipe, tmp_path, no_report):
    assert run("plan", recipe).code == 0
    result = run("train", recipe)
    assert result.code == 0, result.err
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["phase"] for line in lines] == ["all", "polish", "polish"] * 2
    assert all("polish/loss" in line for line in lines if line["phase"] == "polish")
    rounds = read_jsonl(tmp_path / "run" / "rounds.jsonl")
    assert [line["polished"] for line in rounds] == [4, 4]
    assert (tmp_path / "run" / "sharpened").exists()
    assert run("train", recipe).code == 0  # finished: its recipe is the same recipe


def test_its_keys_are_checked_and_written_like_any_other(registered, recipe, tmp_path):
    loaded = load_recipe(recipe)
    assert (loaded.algorithm.polish_steps, loaded.sharpen.keep) == (2, 0.25)
    (tmp_path / "again.yaml").write_text(to_yaml(resolve(loaded, 16)))
    assert resolve(load_recipe(tmp_path / "again.yaml"), 16) == resolve(loaded, 16)
    for override, named in (
        ("sharpen.keep=2", ("sharpen.keep=2.0", "(0, 1]")),
        ("sharpen.kep=1", ("sharpen.kep", "sharpen.keep")),
        ("algorithm.polish_step=1", ("algorithm.polish_step", "algorithm.polish_steps")),
        ("algorithm.beta=1", ("it has no reward",)),
        ("reward.lr=1", ("only rft", "Remove")),
        ("algorithm.name=irft", ("only sharpen", "Remove")),
    ):
        refused("train", recipe, override, named=named)


def test_without_its_line_it_is_unknown(sections, tmp_path):
    del sections["sharpen"]
    sections["algorithm"] = {"name": "sharpen"}
    refused("train", write_recipe(tmp_path / "r.yaml", **sections),
            named=("algorithm.name=sharpen", "sft, irft, spin, rft"))
