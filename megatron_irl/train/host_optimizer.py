"""Adam on the host (Megatron's ``optimizer_cpu_offload``) and in few bytes (precision-aware).

What a recipe must say, what follows from it, and what is refused before weights are read.
"""

from typing import Any

import torch

from megatron_irl import hardware
from megatron_irl.compat.narrow_optimizer import AWARE, DTYPE_KEYS
from megatron_irl.config import Recipe
from megatron_irl.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
          "fp8": torch.uint8}
_OFFLOAD = "optimizer_cpu_offload"
_NEEDS_OFFLOAD = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d",
                  "use_torch_optimizer_for_cpu_offload", "pin_cpu_grads", "pin_cpu_params")


def completed(recipe: Recipe, *, check_hardware: bool) -> dict[str, Any]:
    """The recipe's ``optimizer:`` keys with what follows from them.

    Offloading takes the precision-aware path, which keeps no second copy on the device; all of the
    optimizer unless a fraction is given, and copies beside the updates. Dtypes are written as
    words.

    Args:
        check_hardware: Whether it shall run on this machine.

    Raises:
        UserError: Keys that contradict each other, do nothing, or cannot run here.
    """
    fields = dict(recipe.optimizer)
    for key in DTYPE_KEYS:
        if key in fields:
            fields[key] = _dtype(key, fields[key])
    if fields.get(_OFFLOAD):
        fields = {AWARE: True, "optimizer_offload_fraction": 1.0,
                  "overlap_cpu_optimizer_d2h_h2d": True} | fields
        _check_offload(recipe, fields, check_hardware=check_hardware)
    else:
        for key in _NEEDS_OFFLOAD:
            if key in fields:
                raise UserError(f"optimizer.{key}={fields[key]} does nothing without optimizer."
                                f"{_OFFLOAD}=true. Set that, or remove optimizer.{key}.")
    if fields.get(AWARE):
        _check_aware(recipe, fields)
    if check_hardware and not hardware.IS_CUDA:
        _check_dtypes_of_cpu(recipe, fields)
    _check_grads(recipe, fields)
    return fields


def grad_buffer_fields(recipe: Recipe) -> dict[str, Any]:
    """``ddp:`` keys that follow: gradients in the dtype that the optimizer is told."""
    wanted = recipe.optimizer.get("main_grads_dtype")
    return {} if wanted is None else {"grad_reduce_in_fp32": _dtype("", wanted) == torch.float32}


def _check_offload(recipe: Recipe, fields: dict[str, Any], *, check_hardware: bool) -> None:
    share = fields["optimizer_offload_fraction"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(f"optimizer.optimizer_offload_fraction={share} is outside (0, 1]; it is "
                        "the share of the optimizer on the host. Set it to a number in (0, 1].")
    if not fields[AWARE]:
        raise UserError(f"optimizer.{AWARE}=false conflicts with optimizer.{_OFFLOAD}=true; only "
                        "its path keeps no copy of the weights on the device. Remove it.")
    if recipe.precision == "fp32":
        raise UserError(f"optimizer.{_OFFLOAD}=true conflicts with precision=fp32; what is put on "
                        "the host are the float32 weights of a bf16 model. Set precision to bf16.")
    if fields.get("optimizer", "adam") != "adam":
        raise UserError(f"optimizer.{_OFFLOAD}=true conflicts with optimizer.optimizer="
                        f"{fields['optimizer']}; Megatron has Adam on the host. Set it to adam.")
    if recipe.generation.offload_optimizer and share == 1:
        raise UserError(f"generation.offload_optimizer=true conflicts with optimizer.{_OFFLOAD}="
                        "true; the optimizer is on the host already. Remove the former.")
    if check_hardware and not hardware.IS_CUDA:
        raise UserError(f"optimizer.{_OFFLOAD}=true conflicts with running on CPU; everything is "
                        f"in the host's memory already. Remove optimizer.{_OFFLOAD}.")


def _check_aware(recipe: Recipe, fields: dict[str, Any]) -> None:
    """Megatron's own conditions, which it would say without a remedy or not at all.

    Products in FP8 are none of them, whatever ``model.fp8_recipe`` says: the weights are bf16 then
    as ever. But of weights kept in FP8 it makes neither a shard nor a float32 copy for this
    optimizer to update; told of their recipe, unless it is ``delayed``, it makes the copies of all
    weights itself, beside what is planned and stored here.
    """
    if fields.get("optimizer", "adam") != "adam":
        raise UserError(f"optimizer.{AWARE}=true conflicts with optimizer.optimizer="
                        f"{fields['optimizer']}; only Adam keeps such state. Remove one of them.")
    key = _OFFLOAD if fields.get(_OFFLOAD) else AWARE
    if fields.get("fp8_recipe") not in (None, "delayed"):
        raise UserError(f"optimizer.{key}=true conflicts with optimizer.fp8_recipe="
                        f"{fields['fp8_recipe']}; that speaks of weights kept in FP8, and "
                        "those that it updates are bf16. Remove optimizer.fp8_recipe.")
    if recipe.model.overrides.get("fp8_param"):
        raise UserError(f"optimizer.{key}=true conflicts with model.fp8_param=true; such an "
                        "optimizer has nothing to update of weights in FP8. Remove one of them.")
    for section in ("optimizer", "ddp"):
        if getattr(recipe, section).get("use_distributed_optimizer") is False:
            raise UserError(
                f"optimizer.{AWARE}=true conflicts with {section}.use_distributed_optimizer=false; "
                "only the distributed optimizer has it. Remove one of them."
            )


def _check_dtypes_of_cpu(recipe: Recipe, fields: dict[str, Any]) -> None:
    for key in DTYPE_KEYS[1:]:
        allowed = ("fp32",) if key == "main_params_dtype" else ("fp32", "bf16")
        if fields.get(key, torch.float32) not in [DTYPES[name] for name in allowed]:
            raise UserError(
                f"optimizer.{key}={recipe.optimizer[key]} conflicts with running on CPU; numbers "
                f"with a scale are Transformer Engine's. Set it to {' or '.join(allowed)}."
            )


def _check_grads(recipe: Recipe, fields: dict[str, Any]) -> None:
    wanted = fields.get("main_grads_dtype")
    given = recipe.ddp.get("grad_reduce_in_fp32")
    if wanted is not None and given is not None and given != (wanted == torch.float32):
        raise UserError(
            f"optimizer.main_grads_dtype={recipe.optimizer['main_grads_dtype']} conflicts with "
            f"ddp.grad_reduce_in_fp32={given}; they are the same buffer. Remove one of them."
        )


def _dtype(key: str, value: Any) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if value not in DTYPES:
        raise UserError(f"optimizer.{key}={value} is not one of {', '.join(DTYPES)}. Set it to one "
                        "of them.")
    return DTYPES[value]
