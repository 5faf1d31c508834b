"""Public and own measurements, and recipes that say the same work."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.config import Recipe, recipe_from_mapping, resolve
from megatron_irl.convert.hf_config import Architecture, architecture
from megatron_irl.planning.machines import MACHINES
from megatron_irl.planning.plan import Plan, make_plan
from megatron_irl.planning.workload import Lengths

CONFIGS = Path(__file__).parent / "configs"
ROOT_BASELINE = Path(__file__).parents[2] / "benchmarks" / "h100.json"


def shape(name: str, **changes: Any) -> Architecture:
    return architecture(json.loads((CONFIGS / name / "config.json").read_text()) | changes)


def eighth(layers: int = 8) -> Architecture:
    """8B's shape with a quarter of its layers: 2.8 B parameters."""
    return shape("llama-3.1-8b", num_hidden_layers=layers)


def irft(pairs: int, microbatches: int, *, precision: str = "bf16", **sections: Any) -> Recipe:
    """Pairs of prompts and responses of up to 512 tokens, on one GPU."""
    return resolve(recipe_from_mapping({
        "model": {"hf": "x"} | sections.pop("model", {}),
        "data": {"train": "y", "max_prompt_length": 512, "max_response_length": 512},
        "algorithm": {"name": "irft", "steps_per_round": 8}, "output_dir": "z",
        "train": {"micro_batch_size": pairs, "global_batch_size": pairs * microbatches,
                  "share_prompts": False},
        "precision": precision,
    } | sections), 4000)


def random_lengths(low: int = 256, high: int = 512, count: int = 4000) -> Lengths:
    """As ``megatron-irl benchmark --lengths LOW-HIGH,LOW-HIGH`` draws them."""
    rng = np.random.default_rng(0)
    prompt, response, sample = (rng.integers(low, high + 1, count) for _ in range(3))
    return Lengths(prompt, response, sample, count, "random")


@dataclass(frozen=True)
class Measured:
    """One H100: tokens a second, peak GiB, and where that is written down."""

    name: str
    arch: Architecture
    pairs: int
    microbatches: int
    precision: str
    speed: float
    peak: float | None = None


# Transformer Engine rows at 8 and 16 pairs a microbatch of two builds of the package, and their
# peaks (2026-11-26).
OWN = [
    Measured("1.1B 4x1", shape("llama-1.1b"), 4, 1, "bf16", 41_726, 28.8),
    Measured("1.1B 16x1", shape("llama-1.1b"), 16, 1, "bf16", 65_332, 52.4),
    Measured("2.8B 8x1", eighth(), 8, 1, "bf16", 38_642, 64.7),
    Measured("2.8B 8x1 fp8", eighth(), 8, 1, "fp8", 46_828, 65.8),
    Measured("1.1B 4x1 now", shape("llama-1.1b"), 4, 1, "bf16", 39_900),
    Measured("1.1B 4x4 now", shape("llama-1.1b"), 4, 4, "bf16", 52_600),
    Measured("1.1B 16x1 now", shape("llama-1.1b"), 16, 1, "bf16", 76_800),
    Measured("2.8B 8x1 now", eighth(), 8, 1, "bf16", 41_000),
    Measured("2.8B 8x4 now", eighth(), 8, 4, "bf16", 47_100),
    Measured("2.8B 8x1 fp8 now", eighth(), 8, 1, "fp8", 48_600),
    Measured("2.8B 8x4 fp8 now", eighth(), 8, 4, "fp8", 62_700),
]


def plan_own(row: Measured) -> Plan:
    recipe = irft(row.pairs, row.microbatches, precision=row.precision)
    return make_plan(recipe, row.arch, MACHINES["h100"], random_lengths(), data_parallel_size=1)


@dataclass(frozen=True)
class Anchor:
    """Somebody else's full fine-tuning on H100s: tokens a second and GPU.

    Sequences are whole: every token has a row of the head, as in SFT of one prompt token.
    """

    name: str
    source: str
    model: str
    speed: float
    gpus: int
    length: int
    batch: int
    precision: str = "bf16"
    micro: int = 1
    parallel: tuple[tuple[str, Any], ...] = ()


ANCHORS = [
    Anchor("Llama3-8B FP8", "Megatron-Bridge performance-summary-archive.md", "llama-3.1-8b",
           14_451, 8, 8192, 128, "fp8"),
    Anchor("Llama2-7B SFT FP8", "NeMo performance_summary.md (24.07)", "llama-2-7b",
           17_120, 8, 4096, 32, "fp8"),
    Anchor("Llama3-70B SFT FP8", "Megatron-Bridge performance-summary-archive.md", "llama-3.1-70b",
           1_638, 32, 4096, 32, "fp8", 1,
           (("tensor_model_parallel_size", 4), ("pipeline_model_parallel_size", 4),
            ("virtual_pipeline_model_parallel_size", 5), ("sequence_parallel", True))),
    Anchor("Llama3-70B pretrain FP8", "Megatron-Bridge performance-summary-archive.md",
           "llama-3.1-70b", 1_664, 64, 8192, 128, "fp8", 1,
           (("tensor_model_parallel_size", 4), ("pipeline_model_parallel_size", 8),
            ("virtual_pipeline_model_parallel_size", 5), ("sequence_parallel", True))),
    Anchor("MPT-7B full BF16, 2k", "llm-foundry scripts/train/benchmarking/README.md",
           "llama-2-7b", 10_643, 8, 2048, 512, "bf16", 8),
]


def plan_anchor(anchor: Anchor) -> Plan:
    dp = anchor.gpus
    parallel = dict(anchor.parallel)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        dp //= parallel.get(name, 1)
    recipe = resolve(recipe_from_mapping({
        "model": {"hf": "x"}, "output_dir": "z", "precision": anchor.precision,
        "data": {"train": "y", "max_prompt_length": 1, "max_response_length": anchor.length - 1},
        "algorithm": {"name": "sft", "steps_per_round": 8}, "parallel": parallel,
        "train": {"micro_batch_size": anchor.micro, "global_batch_size": anchor.batch},
        "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    }), 1000)
    lengths = Lengths.equal(1, anchor.length - 1, 1000, "whole sequences")
    return make_plan(recipe, shape(anchor.model), MACHINES["h100"], lengths,
                     data_parallel_size=dp)


def speed(plan: Plan) -> float:
    (value,) = plan.time.tokens_per_second.values()
    return value
