"""Megatron's precision-aware optimizer: built without Transformer Engine, and told of new weights.

Megatron-Core 0.19 has it with Transformer Engine's FusedAdam alone, for whose state it makes no
place before a checkpoint is loaded (``initialize_state`` wants an argument more), of whose state it
lists float32 copies where it wants the groups alone, and whose float32 copies it does not make anew
where weights were changed from outside. To be removed when upstream builds it with any optimizer
that has these methods, and ``reload_model_params`` reaches them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_irl import hardware  # must precede megatron
from megatron_irl.hardware.narrow_adam import NarrowAdam, begin, load_groups

from megatron.core import optimizer as upstream  # isort: skip
from megatron.core.optimizer import OptimizerConfig  # isort: skip

AWARE = "use_precision_aware_optimizer"
DTYPE_KEYS = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def config_of(fields: dict[str, Any], *, runs_here: bool = True) -> OptimizerConfig:
    """Megatron's configuration, also of what it wants to see Transformer Engine's Adam for.

    Args:
        runs_here: Whether it is for this machine; on a GPU that Adam must then be there.
    """
    looks_for_it = fields.get(AWARE) and not fields.get("optimizer_cpu_offload")
    if not looks_for_it or (hardware.IS_CUDA and runs_here):
        return OptimizerConfig(**fields)
    asked = {key: fields[key] for key in (AWARE, *DTYPE_KEYS) if key in fields}
    config = OptimizerConfig(**{k: v for k, v in fields.items() if k not in asked})
    for key, value in asked.items():
        setattr(config, key, value)
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return config


@contextmanager
def buildable(config: OptimizerConfig) -> Iterator[None]:
    """Within the block Megatron builds a CPU's precision-aware optimizer, of ``NarrowAdam``."""
    if hardware.IS_CUDA or not config.use_precision_aware_optimizer:
        yield
        return
    told: dict[str, Any] = {
        "USING_PYTORCH_OPTIMIZER": False, "Adam": NarrowAdam, "is_te_min_version": lambda *_: True,
    }
    before = {name: getattr(upstream, name) for name in told}
    vars(upstream).update(told)
    try:
        yield
    finally:
        vars(upstream).update(before)


def keeps_few_bytes(inner: Any) -> bool:
    """Whether an optimizer keeps the copies of the weights itself, each state in its own dtype.

    ``NarrowAdam`` does, and Transformer Engine's Adam where Megatron asks it to; as plain Adam it
    has the same class and no copies.
    """
    return bool(getattr(inner, "master_weights", False)) and hasattr(inner, "name_to_dtype_map")


def give_state(inner: Any) -> None:
    """Make the state of the parameters that have had no step."""
    for parameter in (p for group in inner.param_groups for p in group["params"]):
        begin(inner, parameter)


def stored_states(inner: Any, parameter: Tensor) -> dict[str, Tensor]:
    """States of a parameter by Megatron's names, as a checkpoint has them: themselves.

    But numbers with a scale (fp16, fp8) are float32 copies: one scale is of a rank's whole range,
    and another layout has other ranges.
    """
    has_scale = (torch.float16, torch.uint8)
    return {
        "param" if name == "master_param" else name:
            inner.get_unscaled_state(parameter, name)
            if inner.name_to_dtype_map[name] in has_scale else state.detach()
        for name, state in inner.state[parameter].items() if name != "step"
    }


@contextmanager
def states_in_place(inner: Any) -> Iterator[None]:
    """Within the block ``state_dict`` holds the states themselves and loading leaves them alone.

    Transformer Engine's copies every state to float32, and to others on the way back; Megatron
    reads and writes the groups alone so, the states one by one.
    """
    if not keeps_few_bytes(inner):
        yield
        return
    inner.state_dict = partial(torch.optim.Optimizer.state_dict, inner)
    inner.load_state_dict = partial(load_groups, inner)
    try:
        yield
    finally:
        del inner.state_dict, inner.load_state_dict


@torch.no_grad()
def reload_main_params(optimizer: Any) -> None:
    """Make the optimizer's float32 copies equal to weights that were changed from outside."""
    optimizer.reload_model_params()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner: Any = getattr(part, "optimizer", None)
        if not keeps_few_bytes(inner):
            continue
        for parameter, state in inner.state.items():
            if state["master_param"].dtype == torch.int16:
                state["master_param"].zero_()  # the weight lacks nothing
            else:
                inner.set_scaled_state(parameter, "master_param", parameter.detach().float())
