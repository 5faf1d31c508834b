"""What is killed: irft and rft over two ranks in every layout, small enough for seconds."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

ALGORITHMS: dict[str, dict[str, Any]] = {
    "irft": {"algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 4, "beta": 0.1}},
    "rft": {
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 3, "policy_steps": 2,
                      "beta": 0.05, "nll_coefficient": 0.1},
        "reward": {"lr": 1e-2, "mix_rounds": 1},
        "policy": {"samples_per_prompt": 2},
    },
}
LAYOUTS = {
    "dp2": {"data_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
}
CASES = [f"{algorithm}_{layout}" for layout in LAYOUTS for algorithm in ALGORITHMS]


def write_inputs(root: Path) -> None:
    """A random model of two layers and demonstrations of one-digit sums, under ``root``."""
    from tests.convert.tiny import make_tiny_llama

    make_tiny_llama(root / "model", layers=2, hidden=32, heads=4, kv_heads=2, intermediate=64)
    rng = random.Random(0)
    for name, count in (("train", 24), ("eval", 4)):
        sums = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
        records = [{"prompt": f"{a}+{b}", "response": str(a + b), "answer": str(a + b)}
                   for a, b in sums]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def write_recipe(case: str, root: Path, output_dir: Path) -> Path:
    """The recipe of a case over the inputs of ``root``; returns its file, beside the folder."""
    algorithm, layout = case.split("_")
    mapping = ALGORITHMS[algorithm] | {
        "model": {"hf": str(root / "model")},
        "data": {"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl"),
                 "max_prompt_length": 48, "max_response_length": 8},
        "generation": {"max_new_tokens": 6, "part_size": 3, "max_requests": 4},
        "train": {"micro_batch_size": 2, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False},
        "checkpoint": {"interval": 2, "asynchronous": True},
        "parallel": LAYOUTS[layout],
        "precision": "fp32", "seed": 3, "output_dir": str(output_dir),
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(mapping))
    return path
