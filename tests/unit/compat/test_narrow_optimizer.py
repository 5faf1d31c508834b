"""Which optimizers are told of weights that were changed from outside, and how."""

import torch

from megatron_irl.compat.adam_state import loadable, make_savable
from megatron_irl.compat.narrow_optimizer import keeps_few_bytes, reload_main_params
from megatron_irl.hardware.narrow_adam import NarrowAdam, joined


class Part:
    """Megatron's optimizer around one of torch's."""

    def __init__(self, inner):
        self.optimizer, self.reloads = inner, 0

    def reload_model_params(self):
        self.reloads += 1


class PlainFused(torch.optim.Optimizer):
    """Transformer Engine's FusedAdam as Megatron builds it for ordinary Adam: no copies."""

    name_to_dtype_map = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32,
                         "master_param": torch.float32}
    master_weights = store_param_remainders = False

    def initialize_state(self, param, store_param_remainders):
        raise AssertionError("its state is Megatron's to make")


def test_plain_adam_of_the_same_class_is_megatrons_own():
    param = torch.zeros(3, requires_grad=True)
    inner = PlainFused([param], {})
    inner.state[param] = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    part = Part(inner)
    assert not keeps_few_bytes(inner) and not keeps_few_bytes(None)
    make_savable(part)
    with loadable(part):
        reload_main_params(part)
    assert part.reloads == 1 and inner.state[param].keys() == {"exp_avg", "exp_avg_sq"}


def test_copies_begin_anew_with_the_weights():
    for remainders in (True, False):
        param = torch.randn(50).bfloat16()
        inner = NarrowAdam([param], lr=1e-3, store_param_remainders=remainders)
        part = Part(inner)
        make_savable(part)
        with loadable(part):
            pass
        param.decoupled_grad = torch.randn(50)
        inner.step()
        param.copy_(torch.randn(50))
        reload_main_params(part)
        master = inner.state[param]["master_param"]
        copy = joined(param, master) if remainders else master
        assert torch.equal(copy, param.float()) and inner.state[param]["exp_avg"].any()
