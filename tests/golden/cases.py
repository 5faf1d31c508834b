"""The recorded runs: recipes that between them take every path of the four algorithms."""

from typing import Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
ALL = ("one", "tp2", "pp2", "dp2")

BASE: dict[str, Any] = {
    "model": {"hf": "llama"},
    "data": {"train": "train.jsonl", "max_prompt_length": 96, "max_response_length": 32},
    "train": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
    "evaluation": {"interval": "never"},
    "logging": {"tensorboard": False},
    "precision": "fp32",
    "seed": 11,
}
SAMPLING = {"max_new_tokens": 10, "chunk_size": 3}
HELDOUT = {"data": {"eval": "eval.jsonl"}, "evaluation": {"interval": "end", "before": True}}

# name -> (layouts, what differs from BASE)
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sft": (ALL, HELDOUT | {"algorithm": {"name": "sft", "rounds": 2, "steps_per_round": 3}}),
    "irft_sigmoid": ((*ALL, "tp2_sp"), HELDOUT | {
        "algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 3, "beta": [0.1, 0.3],
                      "nll_coefficient": 0.0},
        "generation": SAMPLING,
    }),
    "irft_hinge": (ALL, {
        "algorithm": {
            "name": "irft", "rounds": 2, "steps_per_round": 3, "loss": "hinge", "beta": 0.2,
            "nll_coefficient": 0.5, "reset_optimizer": "round",
        },
        "generation": SAMPLING | {"temperature": 0.7, "top_p": 0.9},
    }),
    "irft_linear": (ALL, {
        "algorithm": {
            "name": "irft", "rounds": 2, "steps_per_round": 3, "loss": "linear", "beta": 0.1,
            "reference": "initial", "length_normalize": True, "nll_coefficient": 0.0,
        },
        "generation": SAMPLING,
    }),
    "spin": (ALL, {
        "algorithm": {"name": "spin", "rounds": 2, "beta": 0.1, "mix_previous": True},
        "generation": SAMPLING | {"top_k": 40},
    }),
    "rft": (ALL, HELDOUT | {
        "data": {"eval": "eval.jsonl", "eval_preferences": "preferences.jsonl"},
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 2, "policy_steps": 2,
                      "beta": 0.05},
        "generation": SAMPLING,
        "policy": {"samples_per_prompt": 2},
        "reward": {"lr": 1e-2},
    }),
    "rft_mixed": (ALL, {
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 3, "policy_steps": 2,
                      "beta": 0.05, "nll_coefficient": 0.1},
        "generation": SAMPLING,
        "policy": {"samples_per_prompt": 2, "truncated": "keep", "normalize": "none"},
        "reward": {"lr": 1e-2, "mix_rounds": 1, "preferences": "preferences.jsonl",
                   "trunk_scale": 0.5},
    }),
    "rft_linear": (("one",), {
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 2, "policy_steps": 2,
                      "beta": 0.05},
        "generation": SAMPLING,
        "policy": {"samples_per_prompt": 2},
        "reward": {"loss": "linear", "trunk": "detached", "ledger": "every_round"},
    }),
    "neox": (("one", "tp2"), {
        "model": {"hf": "neox"},
        "algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 2, "beta": 0.1,
                      "nll_coefficient": 0.0},
        "generation": SAMPLING,
    }),
    "bf16": (("one",), {
        "algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 2, "beta": 0.1,
                      "nll_coefficient": 0.0},
        "generation": SAMPLING,
        "precision": "bf16",
    }),
}
# What the ordinary suite compares: every case once, and every layout. The rest is behind the
# command.
SUITE = ("sft/one", "irft_sigmoid/tp2", "irft_hinge/one", "irft_linear/pp2", "spin/one",
         "rft/one", "rft_mixed/dp2", "neox/one", "bf16/one")


def names() -> list[str]:
    """Every recorded run as ``case/layout``."""
    return [f"{case}/{layout}" for case, (layouts, _) in CASES.items() for layout in layouts]


def recipe(name: str, output_dir: str) -> dict[str, Any]:
    """The recipe of ``case/layout`` as the mapping of a YAML file; paths are relative."""
    case, layout = name.split("/")
    mapping = {key: dict(value) if isinstance(value, dict) else value
               for key, value in BASE.items()}
    for key, value in CASES[case][1].items():
        mapping[key] = mapping.get(key, {}) | value if isinstance(value, dict) else value
    mapping["parallel"] = LAYOUTS[layout]
    if layout == "pp2" and "generation" in mapping:
        # As it was recorded. Replicas draw the same samples; fewer requests share a step, so the
        # last bits of the engine's log-probabilities are others.
        mapping["generation"] = mapping["generation"] | {"pipeline": "stages"}
    mapping["output_dir"] = output_dir
    return mapping


def world_size(name: str) -> int:
    """Ranks that a recorded run has."""
    return 1 if name.endswith("/one") else 2
