"""Bytes a parameter takes in the optimizer and in a checkpoint."""

import pytest

from megatron_irl.config import Recipe, recipe_from_mapping
from megatron_irl.planning.state import checkpoint_bytes, optimizer_bytes


def recipe(optimizer, precision) -> Recipe:
    return recipe_from_mapping({
        "model": {"hf": "m"}, "data": {"train": "d"}, "algorithm": {"name": "irft"},
        "output_dir": "o", "optimizer": optimizer, "precision": precision,
    })


@pytest.mark.parametrize(("options", "device", "stored"), [
    ({}, 12, 14), ({"use_precision_aware_optimizer": True}, 10, 12),
    ({"use_precision_aware_optimizer": True, "store_param_remainders": False}, 12, 14),
    ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
     6, 8),
    # Numbers with a scale are stored without it, in float32.
    ({"use_precision_aware_optimizer": True, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"},
     5, 12),
])
def test_bytes_a_parameter(options, device, stored):
    planned = recipe(options, "bf16")
    assert optimizer_bytes(planned) == device
    assert checkpoint_bytes(planned) == stored


def test_bytes_a_parameter_of_fp32():
    """Transformer Engine's Adam has a copy of float32 weights as well."""
    for options, device in (({}, 8), ({"use_precision_aware_optimizer": True}, 12)):
        planned = recipe(options, "fp32")
        assert (optimizer_bytes(planned), checkpoint_bytes(planned)) == (device, 16)
