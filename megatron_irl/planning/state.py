"""Bytes a parameter takes: weight, gradient and optimizer, on the device and in a checkpoint."""

from typing import Any

from megatron_irl.config import Recipe
from megatron_irl.train.host_optimizer import grad_buffer_fields
from megatron_irl.train.optimizer import shards_optimizer

MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")


def element_size(recipe: Recipe) -> int:
    """Bytes of a weight or an activation."""
    return 4 if recipe.precision == "fp32" else 2


def gradient_size(recipe: Recipe) -> int:
    """Bytes of an element of Megatron's gradient buffer, which is also what replicas exchange."""
    ddp = grad_buffer_fields(recipe) | recipe.ddp
    return 4 if ddp.get("grad_reduce_in_fp32", True) else element_size(recipe)


def training_state(recipe: Recipe, trained: int, dp: int) -> dict[str, float]:
    """Megatron's gradient buffer, and what Adam keeps on the device: moments, and a float32 copy of
    bf16.

    Args:
        trained: Elements of this rank.
        dp: Data-parallel size.
    """
    share = dp if shards_optimizer(recipe) else 1
    return {
        "gradients": float(trained * gradient_size(recipe)),
        "optimizer": trained * optimizer_bytes(recipe) / share * (1 - offloaded_share(recipe)),
    }


def optimizer_bytes(recipe: Recipe) -> float:
    """Of the optimizer, a parameter."""
    if _chooses_dtypes(recipe):
        return sum(_size(recipe, key) for key in MOMENTS) + _main_bytes(recipe)
    moments = {"sgd": 1, "lion": 1}.get(recipe.optimizer.get("optimizer", "adam"), 2)
    return 4.0 * moments + (0 if recipe.precision == "fp32" else 4)


def checkpoint_bytes(recipe: Recipe) -> float:
    """Of a checkpoint, a parameter: the weight, and the optimizer's float32 copy and moments.

    In fp32 the copy is the weight itself, and stored all the same. Numbers with a scale (fp16, fp8)
    are stored in float32, others as the optimizer keeps them.
    """
    weight = element_size(recipe)
    if not _chooses_dtypes(recipe):
        return weight + optimizer_bytes(recipe) + (4 if recipe.precision == "fp32" else 0)
    scaled = _scaled(recipe)
    main = 4 if "main_params_dtype" in scaled else _main_bytes(recipe)
    return weight + main + sum(4 if key in scaled else _size(recipe, key) for key in MOMENTS)


def copied_bytes(recipe: Recipe) -> int:
    """On the device while a checkpoint is copied out, a parameter: what is stored in another dtype.

    Numbers with a scale, in float32. All else is read from where the optimizer keeps it.
    """
    return 4 * len(_scaled(recipe))


def _scaled(recipe: Recipe) -> list[str]:
    """Which of the state's dtypes have a scale."""
    keys = ("main_params_dtype", *MOMENTS) if _chooses_dtypes(recipe) else ()
    return [key for key in keys if recipe.optimizer.get(key) in ("fp16", "fp8")]


def _chooses_dtypes(recipe: Recipe) -> bool:
    """Whether Megatron's precision-aware optimizer keeps the state, on the device."""
    return bool(recipe.optimizer.get("use_precision_aware_optimizer")) and not offloaded_share(
        recipe
    )


def _size(recipe: Recipe, key: str) -> int:
    return {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}.get(str(recipe.optimizer.get(key)), 4)


def _main_bytes(recipe: Recipe) -> int:
    """Of a float32 copy: what a bf16 weight itself does not have, where Megatron keeps that."""
    size = _size(recipe, "main_params_dtype")
    keeps_half = recipe.optimizer.get("store_param_remainders", True)
    return 2 if size == 4 and recipe.precision != "fp32" and keeps_half else size


def offloaded_share(recipe: Recipe) -> float:
    """Share of the optimizer that Megatron keeps and computes on the host."""
    options: dict[str, Any] = recipe.optimizer
    if not options.get("optimizer_cpu_offload"):
        return 0.0
    return float(options.get("optimizer_offload_fraction", 1.0))
