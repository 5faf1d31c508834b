"""Adam whose state takes few bytes, where Transformer Engine's is not: on the CPU.

It keeps what Megatron's precision-aware optimizer asks of ``FusedAdam``: gradients in
``decoupled_grad``, moments in a dtype of their own, and of a bf16 parameter's float32 copy only the
16 bits that the parameter does not have. Same state, same names, same numbers but for the order in
which a kernel multiplies.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
_HALF = 1 << 16


class NarrowAdam(torch.optim.Optimizer):
    """Adam, or AdamW, on parameters in bf16 or float32.

    Args:
        params: Parameters or groups, of which each parameter has a ``decoupled_grad`` at a step.
        adam_w_mode: Weight decay beside the gradient (AdamW), not in it.
        exp_avg_dtype, exp_avg_sq_dtype: Of the moments between steps; a step computes in float32.
        store_param_remainders: Keep of a bf16 parameter's float32 copy what it lacks (int16).

    The other arguments are ``FusedAdam``'s, and must say what this does.

    Raises:
        ValueError: Moments of a dtype that this does not keep.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, *, adam_w_mode: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32, exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weights: bool = True, master_weight_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = True, store_param_remainders: bool = True,
        capturable: bool = False,
    ) -> None:
        if not {exp_avg_dtype, exp_avg_sq_dtype} <= set(DTYPES):
            raise ValueError(f"moments in {exp_avg_dtype} and {exp_avg_sq_dtype}: only {DTYPES}")
        if capturable or not (master_weights and use_decoupled_grad
                              and master_weight_dtype == torch.float32):
            raise ValueError("only float32 copies and decoupled gradients, outside of graphs")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.master_weights, self.store_param_remainders = True, store_param_remainders
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": torch.float32,
        }
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        """Zero moments, and a float32 copy equal to the parameter."""
        state = self.state[param]
        state["step"] = torch.zeros(())  # a tensor of each parameter, as torch's own Adam has
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=self.name_to_dtype_map[name])
        if param.dtype == torch.float32:
            state["master_param"] = param.detach()  # itself
        elif store_param_remainders:
            state["master_param"] = torch.zeros_like(param, dtype=torch.int16)
        else:
            state["master_param"] = param.detach().float()

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """A state in float32; what a parameter lacks of its float32 copy as it is (int16)."""
        state = self.state[param][state_name]
        return state.float() if state.dtype == torch.bfloat16 else state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set a state to what ``get_unscaled_state`` gave."""
        kept = self.state[param][state_name]
        if kept.dtype == torch.int16 and unscaled_state.dtype != torch.int16:
            raise TypeError(f"{state_name} holds 16 bits of a number, not {unscaled_state.dtype}")
        kept.copy_(unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups and states over; states keep their dtypes and places, or get them."""
        load_groups(self, state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, given in state_dict["state"].items():
            param = parameters[number]
            begin(self, param)
            for name, value in given.items():
                # Torch's own would cast all to the parameter's dtype.
                self.state[param][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update in place every parameter that has a ``decoupled_grad``."""
        assert closure is None, "Megatron gives none"
        for group in self.param_groups:
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None)
                if grad is not None:
                    self._step(param, grad.float(), group)

    def _step(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        begin(self, param)
        state = self.state[param]
        moments = [self.get_unscaled_state(param, name) for name in ("exp_avg", "exp_avg_sq")]
        master = state["master_param"]
        values = joined(param, master) if master.dtype == torch.int16 else master
        state["step"] += 1
        self._update(
            [values], [grad], [moments[0]], [moments[1]], [], [state["step"]],
            lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=float(group["weight_decay"]), eps=group["eps"], amsgrad=False,
            maximize=False,
        )
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            if moment is not state[name]:
                state[name].copy_(moment)
        if master.dtype == torch.int16:
            split(values, param, master)
        elif param.dtype != torch.float32:
            param.copy_(values)


def begin(optimizer: Any, param: Tensor) -> None:
    """Make a parameter's state, if it has none, in this optimizer or Transformer Engine's.

    Of a bf16 parameter's float32 copy the 16 bits that it lacks, unless told to keep it whole.
    """
    if not optimizer.state[param]:
        keeps_half = optimizer.store_param_remainders and param.dtype == torch.bfloat16
        optimizer.initialize_state(param, keeps_half)


def load_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Take over the groups alone; the states stay as and where they are."""
    states = dict(optimizer.state)
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    optimizer.state.update(states)


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers (any shape) of which ``split`` made a bf16 and an int16 tensor."""
    # A bf16 is the upper half of a float32, rounded: up where the lower half, read as a signed
    # number, is negative.
    high = param.detach().view(torch.int16).int() - (remainder < 0).int()
    return (high * _HALF + (remainder.int() & 0xFFFF)).view(torch.float32)


def split(values: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write float32 ``values`` into ``param`` (bf16), and what it lacks into ``remainder``."""
    bits = values.view(torch.int32)
    low = bits.to(torch.int16)  # the lower half: the conversion drops the rest
    high = (bits >> 16) + (low < 0).int()
    param.view(torch.int16).copy_(high.to(torch.int16))
    remainder.copy_(low)
