"""One tiny model, one small arithmetic data set, a recipe over both, and runs of it."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import run, write_jsonl, write_recipe
from tests.convert.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random Llama (two layers) with tokenizer and chat template; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    return make_tiny_llama(folder, layers=2, hidden=32, heads=4, kv_heads=2, intermediate=64)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    """Demonstrations of one-digit sums."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def record() -> dict[str, Any]:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        turn = {"role": "assistant", "content": str(a + b)}
        return {"messages": [{"role": "user", "content": f"{a}+{b}"}, turn], "answer": str(a + b)}

    return {
        name: write_jsonl(folder / f"{name}.jsonl", [record() for _ in range(count)])
        for name, count in (("train", 16), ("eval", 5))
    }


def small_recipe(model: Path, data: dict[str, Path], output_dir: Path) -> dict[str, Any]:
    """Two rounds of two steps in fp32, as the mapping of a recipe file."""
    return {
        "model": {"hf": str(model)},
        "data": {
            "train": str(data["train"]), "eval": str(data["eval"]),
            "max_prompt_length": 48, "max_response_length": 8,
        },
        "algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 2, "beta": 0.1},
        "generation": {"max_new_tokens": 6, "part_size": 3},
        "train": {"micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False},
        "precision": "fp32",
        "seed": 3,
        "output_dir": str(output_dir),
    }


# What the environment of ``finished`` says, and nothing of what the run writes may repeat.
KEYS = {"WANDB_API_KEY": "5ec4e7" * 6 + "aaaa", "HF_TOKEN": "hf_VeryPrivateIndeed"}


@pytest.fixture
def sections(model, data, tmp_path) -> dict[str, Any]:
    """The small recipe as a mapping, to be changed by a test."""
    return small_recipe(model, data, tmp_path / "run")


@pytest.fixture
def recipe(sections, tmp_path) -> Path:
    """The small recipe as a file."""
    return write_recipe(tmp_path / "recipe.yaml", **sections)


@pytest.fixture(scope="session")
def finished(model, data, tmp_path_factory) -> Path:
    """The folder of a finished run of the small recipe, with every tracker; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    mapping = small_recipe(model, data, root / "run")
    mapping["logging"] = {"tensorboard": True, "wandb": True, "wandb_mode": "offline"}
    with pytest.MonkeyPatch.context() as patch:
        for name, key in KEYS.items():
            patch.setenv(name, key)
        result = run("train", write_recipe(root / "recipe.yaml", **mapping))
    assert result.code == 0, result.err
    (root / "output.txt").write_text(result.err)
    return root / "run"


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Leave out report.html, whose charts take longer than the small runs themselves."""
    monkeypatch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
