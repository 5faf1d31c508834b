"""IRFT that generates once per pass over the data is SPIN, as whole runs."""

import pytest
import yaml

from tests.cli.harness import deterministic, read_jsonl, run, write_recipe


@pytest.mark.parametrize("rounds", [1, 2])
def test_irft_with_one_generation_per_pass_equals_spin(sections, tmp_path, no_report, rounds):
    resolved = {}
    for name in ("irft", "spin"):
        algorithm = {"name": name, "rounds": rounds, "beta": 0.1, "nll_coefficient": 0.0}
        folder = tmp_path / name
        changed = sections | {"algorithm": algorithm, "output_dir": str(folder)}
        result = run("train", write_recipe(tmp_path / f"{name}.yaml", **changed))
        assert result.code == 0, result.err
        resolved[name] = yaml.safe_load((folder / "recipe.yaml").read_text())
    irft, spin = tmp_path / "irft", tmp_path / "spin"
    assert len(deterministic(irft)) == rounds * 4  # 16 demonstrations, 4 pairs a step
    assert deterministic(irft) == deterministic(spin)
    one, other = (read_jsonl(folder / "rounds.jsonl") for folder in (irft, spin))
    assert [line["evaluation"] for line in one] == [line["evaluation"] for line in other]
    weights = "hf/model.safetensors"
    assert (irft / weights).read_bytes() == (spin / weights).read_bytes()
    for recipe in resolved.values():
        recipe["algorithm"].pop("name")
        del recipe["environment"], recipe["output_dir"]
    assert resolved["irft"] == resolved["spin"]


def test_more_generations_are_another_algorithm(sections, tmp_path, no_report):
    """What the test above would miss if a round's length were ignored."""
    runs = {}
    for name, algorithm in (
        ("spin", {"name": "spin"}), ("irft", {"name": "irft", "rounds": 2, "steps_per_round": 2})
    ):
        folder = tmp_path / name
        changed = sections | {"algorithm": algorithm, "output_dir": str(folder)}
        assert run("train", write_recipe(tmp_path / f"{name}.yaml", **changed)).code == 0
        runs[name] = deterministic(folder)
    assert len(runs["spin"]) == len(runs["irft"]) == 4
    assert runs["spin"] != runs["irft"]
