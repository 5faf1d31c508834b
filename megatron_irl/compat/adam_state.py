"""Saving and loading torch's Adam under Megatron's distributed optimizer.

Transformer Engine's and Apex's fused Adam keep the step count in the parameter groups; torch's,
used where neither is installed, keeps a tensor per parameter. Megatron-Core 0.19 saves that once a
step is taken, and fails to save it before, and to load it. Of torch's SGD it has no way to make the
state that a checkpoint is loaded into, so that its momentum could be saved and not loaded. To be
removed when ``DistributedOptimizer`` saves a fresh ``torch.optim.AdamW`` and loads what it saved
into one, and ``get_megatron_optimizer`` has an ``init_state_fn`` for ``torch.optim.SGD``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from megatron_irl.compat.narrow_optimizer import give_state, keeps_few_bytes


@contextmanager
def loadable(optimizer: Any) -> Iterator[None]:
    """Within the block a checkpoint can be read into ``optimizer`` (Megatron's, or None).

    Does nothing for optimizers other than torch's Adam and SGD, and the precision-aware one.
    """
    with ExitStack() as stack:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(part, "optimizer", None)
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                stack.enter_context(_loadable(part, inner))
            elif isinstance(inner, torch.optim.SGD):
                _give_momentum(inner)
                part.init_state_fn = lambda *_: None  # it is None, and called
            elif keeps_few_bytes(inner):
                give_state(inner)
                stack.callback(_part_counts, inner)
        yield


def make_savable(optimizer: Any) -> None:
    """Give an optimizer the state that loading asks for, if no step was taken yet."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            _give_state(inner)
        elif isinstance(inner, torch.optim.SGD):
            _give_momentum(inner)
        elif keeps_few_bytes(inner):
            give_state(inner)


@contextmanager
def _loadable(part: Any, inner: torch.optim.Optimizer) -> Iterator[None]:
    _give_state(inner)  # loading fills what is there; a fresh Adam has nothing
    copy_in = getattr(part, "_set_main_param_and_optimizer_states", None)
    if copy_in is None:  # not the distributed optimizer
        yield
        return

    def without_step(model_param: Any, tensors: dict[str, Any]) -> None:
        # The count is read from the parameter groups; here it is asked for and not there.
        copy_in(model_param, {"step": None} | tensors)

    part._set_main_param_and_optimizer_states = without_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
    _part_counts(inner)


def _part_counts(inner: Any) -> None:
    """Give each parameter its own count: Megatron loads one tensor for all of them.

    Adam counts in place: shared, the count would grow by the number of parameters at every update.
    """
    for values in inner.state.values():
        if "step" in values:  # not Transformer Engine's
            values["step"] = values["step"].clone()


def _give_state(inner: torch.optim.Optimizer) -> None:
    """Zero moments and a zero count, as Adam itself would make at its first step."""
    for parameter in (p for group in inner.param_groups for p in group["params"]):
        if not inner.state[parameter]:
            inner.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _give_momentum(inner: torch.optim.SGD) -> None:
    """Zero momentum where there is to be some: a first step with it is the one without."""
    for group in inner.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
