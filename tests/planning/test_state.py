"""Bytes a parameter takes in the optimizer and in a checkpoint."""

import pytest

from megatron_irl.config import Recipe, recipe_from_mapping
from megatron_irl.planning.state import (
    checkpoint_bytes,
    copied_bytes,
    gradient_size,
    optimizer_bytes,
)


def recipe(optimizer, precision, **sections) -> Recipe:
    return recipe_from_mapping({
        "model": {"hf": "m"}, "data": {"train": "d"}, "algorithm": {"name": "irft"},
        "output_dir": "o", "optimizer": optimizer, "precision": precision,
    } | sections)


FEW = {"use_precision_aware_optimizer": True}


@pytest.mark.parametrize(("options", "device", "stored", "copied"), [
    ({}, 12, 14, 0), (FEW, 10, 12, 0), (FEW | {"store_param_remainders": False}, 12, 14, 0),
    (FEW | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 6, 8, 0),
    # Numbers with a scale are stored without it, in float32.
    (FEW | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}, 5, 12, 8),
    (FEW | {"main_params_dtype": "fp16"}, 10, 14, 4),
    # On the host there is nothing that has one.
    (FEW | {"optimizer_cpu_offload": True, "exp_avg_dtype": "fp8"}, 12, 14, 0),
])
def test_bytes_a_parameter(options, device, stored, copied):
    planned = recipe(options, "bf16")
    assert optimizer_bytes(planned) == device
    assert checkpoint_bytes(planned) == stored
    assert copied_bytes(planned) == copied


def test_bytes_a_parameter_of_fp32():
    """Transformer Engine's Adam has a copy of float32 weights as well."""
    for options, device in (({}, 8), (FEW, 12)):
        planned = recipe(options, "fp32")
        assert (optimizer_bytes(planned), checkpoint_bytes(planned)) == (device, 16)


def test_gradients_have_the_dtype_that_either_section_says():
    assert gradient_size(recipe({}, "bf16")) == 4
    for optimizer, ddp in ((FEW | {"main_grads_dtype": "bf16"}, {}),
                           ({}, {"grad_reduce_in_fp32": False})):
        assert gradient_size(recipe(optimizer, "bf16", ddp=ddp)) == 2
