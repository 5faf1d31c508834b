"""The recipes of the methods that a study compares, as plain mappings.

Common settings: ``lr``; ``batch``; ``steps`` on demonstrations, the same for all of a study.
``irft`` also reads ``rounds`` (T; then K = steps / T), ``beta``, ``loss``, ``anchor`` and
``reference``; ``spin``, whose rounds are passes, ``rounds`` and not ``steps``; ``rft`` ``rounds``,
``beta``, ``anchor``, ``head_lr``, ``policy_steps`` of each round and ``samples`` of each prompt;
``smoothed`` is sft with ``smoothing`` of its targets; ``filtered`` is sft on the share ``keep`` of
the demonstrations that the reward of an rft run with the settings ``reward`` likes best (where
these have a ``kind``, the run is shared with other points).
``best_of`` trains nothing of its own: the method in ``draws`` answers ``n`` times, and the reward
of the one in ``judge`` takes the answer it likes best. Samples are drawn at ``temperature``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]


def recipe_of(
    method: str, settings: Settings, *, start: Path, demonstrations: Path, out: Path, seed: int
) -> dict[str, Any]:
    """The recipe of a run.

    Args:
        method: A name in ``ALGORITHMS``.
        start: HF folder of the starting model.
        demonstrations: File with prompts and answers.
    """
    common = {
        "model": {"hf": str(start)},
        "data": {"train": str(demonstrations), "max_prompt_length": 24,
                 "max_response_length": 16},
        "evaluation": {"interval": "never"},
        "train": {"micro_batch_size": settings["batch"], "global_batch_size": settings["batch"]},
        "optimizer": {"lr": settings["lr"], "weight_decay": settings.get("weight_decay", 0.0)},
        "generation": {"max_requests": 256, "max_new_tokens": 12},
        "logging": {"tensorboard": False, "interval": 100},
        "precision": "fp32", "seed": seed, "output_dir": str(out),
    }
    return common | ALGORITHMS[method](settings)


def _sft(settings: Settings) -> dict[str, Any]:
    return {"algorithm": {"name": "sft", "steps_per_round": settings["steps"]}}


def _dft(settings: Settings) -> dict[str, Any]:
    recipe = _sft(settings)
    recipe["algorithm"]["token_weight"] = "probability"
    return recipe


def _smoothed(settings: Settings) -> dict[str, Any]:
    recipe = _sft(settings)
    recipe["algorithm"]["label_smoothing"] = settings["smoothing"]
    return recipe


def _spin(settings: Settings) -> dict[str, Any]:
    return {"algorithm": {
        "name": "spin", "rounds": settings["rounds"], "beta": settings["beta"],
        "nll_coefficient": settings.get("anchor", 0.0)}}


def _irft(settings: Settings) -> dict[str, Any]:
    rounds = settings["rounds"]
    return {"algorithm": {
        "name": "irft", "rounds": rounds, "steps_per_round": settings["steps"] // rounds,
        "beta": settings["beta"], "loss": settings.get("loss", "sigmoid"),
        "nll_coefficient": settings.get("anchor", 0.0),
        "reference": settings.get("reference", "round_start"),
        "length_normalize": settings.get("length_normalize", False),
    }}


def _rft(settings: Settings) -> dict[str, Any]:
    rounds = settings["rounds"]
    return {
        "algorithm": {
            "name": "rft", "rounds": rounds, "reward_steps": settings["steps"] // rounds,
            "policy_steps": settings["policy_steps"], "beta": settings["beta"],
            "nll_coefficient": settings.get("anchor", 1.0)},
        "reward": {"lr": settings["head_lr"], "mix_rounds": rounds - 1},
        "policy": {"samples_per_prompt": settings.get("samples", 4)},
    }


ALGORITHMS = {"sft": _sft, "filtered": _sft, "dft": _dft, "smoothed": _smoothed, "spin": _spin,
              "irft": _irft, "rft": _rft}
