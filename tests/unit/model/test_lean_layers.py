"""Parts that stand in for Megatron's: the same numbers, and the flags they need."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_irl.errors import UserError
from megatron_irl.model import weight_gradients
from megatron_irl.model.lean_layers import residual_add
from megatron_irl.model.weight_gradients import (
    accumulate_in_layers,
    check_accumulation,
    without_apex,
)

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # isort: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("prob", "dtypes"), [
    (0.0, (torch.float32, torch.float32)), (0.0, (torch.bfloat16, torch.float32)),
    (0.3, (torch.float32, torch.float32)),
])
def test_residual_add_equals_megatrons(training, has_bias, prob, dtypes):
    output, residual = (torch.randn(7, 1, 16, dtype=t).requires_grad_() for t in dtypes)
    bias = torch.randn(16) if has_bias else None
    results = []
    for make in (residual_add, get_bias_dropout_add):
        torch.manual_seed(5)  # the dropout's
        added = make(training, False)((output, bias), residual, prob)
        gradients = torch.autograd.grad(added.sum(), (output, residual))
        results.append((added, *gradients))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_layers_are_told_to_accumulate_and_others_left_alone():
    layer = nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False
    model = nn.Sequential(layer, nn.Linear(2, 2))
    accumulate_in_layers(model)
    assert layer.fuse_wgrad_accumulation is True
    assert not hasattr(model[1], "fuse_wgrad_accumulation")


@pytest.mark.parametrize(("apex", "while_built"), [(False, False), (True, True)])
def test_the_head_is_built_without_asking_for_apex(monkeypatch, apex, while_built):
    monkeypatch.setattr(weight_gradients, "_has_apex_kernel", lambda: apex)
    config = SimpleNamespace(gradient_accumulation_fusion=True)
    with pytest.raises(RuntimeError), without_apex(config):
        assert config.gradient_accumulation_fusion is while_built
        raise RuntimeError
    assert config.gradient_accumulation_fusion is True


def test_accumulation_in_local_layers_needs_apex(monkeypatch):
    monkeypatch.setattr(weight_gradients, "_has_apex_kernel", lambda: False)
    check_accumulation("transformer_engine", True)
    check_accumulation("local", False)
    with pytest.raises(UserError, match="without Apex.*Remove model.gradient_accumulation_fusion"):
        check_accumulation("local", True)
    monkeypatch.setattr(weight_gradients, "_has_apex_kernel", lambda: True)
    check_accumulation("local", True)
