"""Precision names of a recipe → Megatron's fields."""

from typing import Any

import torch

from megatron_irl import hardware
from megatron_irl.errors import UserError

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def precision_fields(
    precision: str, overrides: dict[str, Any], *, check_hardware: bool = True
) -> dict[str, Any]:
    """TransformerConfig fields for ``precision`` (fp32, bf16 or fp8).

    ``model.fp8`` (``hybrid`` by default, or ``e4m3``) and ``model.fp8_recipe`` pass through.
    Without ``check_hardware`` the fields are for a run on another machine.

    Raises:
        UserError: FP8 without a GPU and Transformer Engine, or an unknown FP8 recipe.
    """
    if precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    fields: dict[str, Any] = {
        "bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16,
    }
    if precision == "bf16":
        return fields
    recipe = overrides.get("fp8_recipe", "tensorwise")
    if recipe not in FP8_RECIPES:
        raise UserError(
            f"model.fp8_recipe={recipe} is not one of {', '.join(FP8_RECIPES)}. Set one of these."
        )
    if check_hardware and not hardware.IS_CUDA:
        raise UserError(
            "precision=fp8 conflicts with running on CPU; FP8 matrix products need an NVIDIA GPU "
            "of compute capability 8.9 or newer (Blackwell for mxfp8) and Transformer Engine. "
            "Set precision to bf16 or fp32 here."
        )
    return fields | {"fp8": overrides.get("fp8", "hybrid"), "fp8_recipe": recipe}
