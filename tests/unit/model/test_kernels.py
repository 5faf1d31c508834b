"""What a run computes with is said, and what is slow warned of; assertions come in words."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.hardware import paged_attention
from megatron_irl.model import kernels
from megatron_irl.model.kernels import Kernels, check_environment, describe_kernels

from megatron.core.transformer.enums import AttnBackend  # isort: skip

CHOSEN = "transformer_engine.pytorch.attention.dot_product_attention"


class Core(nn.Module):
    """Transformer Engine's attention as far as the probe sees it: records what it would take."""

    def __init__(self, config, record, taken):
        super().__init__()
        self.config, self.record, self.taken = config, record, taken

    def forward(self, query, key, value, mask, mask_type, *, packed_seq_params):
        assert mask is None and mask_type.name == "causal" and packed_seq_params.qkv_format == "thd"
        assert query.shape == (64, 4, 8) and key.shape == value.shape == (64, 1, 8)
        assert query.requires_grad, "a forward without gradient may take another kernel"
        self.record.update({f"use_{name}_attention": name == self.taken
                            for name in ("flash", "fused", "unfused")})
        return query


@pytest.fixture
def gpu_model(monkeypatch):
    """Makes models of Transformer Engine's layers on a pretended GPU."""
    monkeypatch.setattr(hardware, "IS_CUDA", True)
    monkeypatch.setattr(hardware, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(hardware, "library_versions", lambda: {"cuDNN": "9.19.0"})
    record = {}
    module = ModuleType(f"{CHOSEN}.dot_product_attention")
    module._attention_backends = record
    names = CHOSEN.split(".")
    for depth in range(1, len(names) + 1):
        parent = ModuleType(".".join(names[:depth]))
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
    sys.modules[CHOSEN].dot_product_attention = module
    config = SimpleNamespace(
        tensor_model_parallel_size=2, num_attention_heads=8, num_query_groups=2, kv_channels=8,
        params_dtype=torch.bfloat16, flash_attention_version=None,
    )

    def make(taken):
        model = nn.Module()
        model.core_attention = Core(config, record, taken)
        model.config = config
        return model

    return make


@pytest.mark.parametrize(("taken", "said"), [
    ("fused", "fused (cuDNN)"), ("flash", "flash-attn"), ("unfused", "unfused"),
])
def test_transformer_engine_is_asked_by_a_forward(gpu_model, monkeypatch, taken, said):
    monkeypatch.setattr(kernels.upstream, "flash_attn_with_kvcache", object())
    found = describe_kernels(gpu_model(taken), layers="transformer_engine", not_captured=None)
    assert found.training_attention == said
    assert found.generation_attention == "flash-attn 2"
    assert f"attention: {said} in training, flash-attn 2 in generation" in found.line()
    assert "decoding: CUDA graphs" in found.line()
    assert "cuDNN 9.19.0" in found.line() and found.as_dict()["versions"]["cuDNN"] == "9.19.0"
    warned = " ".join(found.warnings())
    assert ("UNFUSED" in warned and "CUDNN_HOME" in warned) == (taken == "unfused")


def test_the_probe_leaves_the_runs_random_numbers_alone(gpu_model):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    describe_kernels(gpu_model("fused"), layers="transformer_engine", not_captured=None)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(("newer", "pinned", "kernel", "said"), [
    ((False, False), None, None, "SDPA fallback"),
    ((False, False), None, paged_attention.flash_attn_with_kvcache, "SDPA fallback"),
    ((False, False), None, object(), "flash-attn 2"),
    ((False, True), None, object(), "flash-attn 3"),
    ((True, True), None, object(), "flash-attn 4"),
    ((True, True), 3, object(), "flash-attn 3"),
])
def test_kernel_of_generation(gpu_model, monkeypatch, newer, pinned, kernel, said):
    monkeypatch.setattr(kernels.upstream, "flash_attn_with_kvcache", kernel)
    monkeypatch.setattr(kernels.upstream, "HAVE_FA4", newer[0])
    monkeypatch.setattr(kernels.upstream, "HAVE_FA3", newer[1])
    model = gpu_model("fused")
    model.config.flash_attention_version = pinned
    found = describe_kernels(model, layers="transformer_engine", not_captured=None)
    assert found.generation_attention == said
    assert ("Install flash-attn" in " ".join(found.warnings())) == (said == "SDPA fallback")


def test_on_a_cpu_there_is_nothing_to_warn_of():
    model = nn.Module()
    model.config = SimpleNamespace(params_dtype=torch.bfloat16)
    found = describe_kernels(model, layers="local", not_captured="there is no CUDA device")
    assert (found.training_attention, found.generation_attention) == ("SDPA", "SDPA")
    assert found.warnings() == [] and "layers: local" in found.line()
    assert "decoding: eager (there is no CUDA device)" in found.line()


def test_slow_kernels_are_both_named():
    found = Kernels("transformer_engine", "unfused", "SDPA fallback", "CUDA graphs", {}).warnings()
    assert len(found) == 2


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_switches_of_transformer_engine_are_refused_in_words(monkeypatch, name):
    for other in kernels.SWITCHES[AttnBackend.auto]:
        monkeypatch.delenv(other, raising=False)
    check_environment(AttnBackend.auto)
    monkeypatch.setenv(name, "1")  # what Megatron itself sets for this backend
    check_environment(AttnBackend.auto)
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=f"{name}=0 .*attention_backend=auto.*Unset {name}"):
        check_environment(AttnBackend.auto)
