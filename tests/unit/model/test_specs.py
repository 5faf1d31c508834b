"""Which layers a model is built of, on machines of several kinds."""

import sys
import types

import pytest
import torch

from megatron_irl import hardware
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.errors import UserError
from megatron_irl.model import specs
from megatron_irl.model.build import build_config
from tests.convert.test_table import BASE, NEOX
from tests.convert.tiny import make_tiny_llama

BF16, FP32 = torch.bfloat16, torch.float32
TE, LOCAL = "transformer_engine", "local"


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with or without a GPU and Transformer Engine."""

    def pretend(cuda: bool, installed: bool, variable: str | None = None) -> None:
        monkeypatch.setattr(hardware, "IS_CUDA", cuda)
        fake = types.ModuleType(TE) if installed else None
        monkeypatch.setitem(sys.modules, TE, fake)
        monkeypatch.setitem(sys.modules, f"{TE}.pytorch", fake)
        monkeypatch.delenv(specs.VARIABLE, raising=False)
        if variable is not None:
            monkeypatch.setenv(specs.VARIABLE, variable)
        specs._why_no_transformer_engine.cache_clear()

    yield pretend
    specs._why_no_transformer_engine.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "installed", "variable", "dtype", "fp8", "expected"),
    [
        (False, False, None, BF16, None, LOCAL),
        (False, True, None, BF16, None, LOCAL),
        (True, True, None, BF16, None, TE),
        (True, True, None, BF16, "hybrid", TE),
        (True, True, "", BF16, None, TE),
        (True, True, None, FP32, None, LOCAL),  # Transformer Engine's fp32 products are TF32
        (True, True, TE, FP32, None, TE),
        (True, True, LOCAL, BF16, None, LOCAL),
        (True, False, None, BF16, None, LOCAL),
        (True, False, LOCAL, BF16, None, LOCAL),
    ],
)
def test_choice(machine, cuda, installed, variable, dtype, fp8, expected):
    machine(cuda, installed, variable)
    assert specs.choose_spec(dtype, fp8) == expected


@pytest.mark.parametrize(
    ("cuda", "installed", "variable", "fp8", "message"),
    [
        (True, True, "te", None, "MEGATRON_IRL_SPEC=te is not one of transformer_engine, local"),
        (False, True, TE, None, "conflicts with running on CPU.*Unset MEGATRON_IRL_SPEC"),
        (True, False, TE, None, "Install transformer-engine.*MEGATRON_IRL_SPEC=local"),
        (True, True, LOCAL, "hybrid", "precision=fp8 conflicts with MEGATRON_IRL_SPEC=local"),
        (True, False, None, "hybrid", "precision=fp8 conflicts with.*Install transformer-engine"),
    ],
)
def test_what_cannot_run_is_the_users_error(machine, cuda, installed, variable, fp8, message):
    machine(cuda, installed, variable)
    with pytest.raises(UserError, match=message):
        specs.choose_spec(BF16, fp8)


def test_what_transformer_engine_lacks_is_built_of_local_layers(machine):
    machine(True, True)
    assert specs.choose_spec(BF16, local_only="soft-capped attention scores") == LOCAL
    with pytest.raises(UserError, match="precision=fp8 conflicts with a model with soft-capped"):
        specs.choose_spec(BF16, "hybrid", local_only="soft-capped attention scores")
    with pytest.raises(UserError, match="spec=transformer_engine conflicts with a model with"):
        specs.choose_spec(BF16, asked=TE, local_only="soft-capped attention scores")


def test_a_scaled_rope_is_not_fused(machine, tmp_path):
    """The fused kernel has no scale; leaving it out would be silent."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_tiny_llama(tmp_path / "hf", layers=1, rope_scaling=yarn)
    arch = architecture(read_hf_config(folder))
    machine(True, True)
    with pytest.raises(UserError, match="whose rope scales cosines and sines by 1.139"):
        build_config(
            arch, ParallelConfig(), precision="bf16", overrides={"apply_rope_fusion": True}
        )
    assert build_config(arch, ParallelConfig(), precision="bf16").apply_rope_fusion is False


def test_an_argument_goes_before_the_variable(machine):
    machine(True, True, TE)
    assert specs.choose_spec(BF16, asked=LOCAL) == LOCAL


def test_falling_back_is_said_once(machine, caplog):
    machine(True, False)
    specs.choose_spec(BF16)
    specs.choose_spec(BF16)
    assert [r.levelname for r in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("installed", "variable"), [(False, None), (False, LOCAL), (True, LOCAL)]
)
def test_rope_is_fused_only_over_transformer_engine(machine, tmp_path, installed, variable):
    """The local spec has one angle per packed token, which the fused kernel would misread."""
    arch = architecture(read_hf_config(make_tiny_llama(tmp_path / "hf", layers=1)))
    machine(True, installed, variable)
    config = build_config(arch, ParallelConfig(), precision="bf16")
    assert config.apply_rope_fusion is False
    with pytest.raises(UserError, match="Remove model.apply_rope_fusion"):
        build_config(
            arch, ParallelConfig(), precision="bf16", overrides={"apply_rope_fusion": True}
        )


@pytest.mark.parametrize(("cuda", "expected"), [(True, "highest"), (False, "high")])
def test_fp32_products_on_a_gpu_are_not_tf32(monkeypatch, cuda, expected):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(hardware, "IS_CUDA", cuda)
    try:
        torch.set_float32_matmul_precision("high")  # as NVIDIA's image starts
        hardware.keep_float32()
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_lean_activation_is_refused_where_the_model_has_another():
    arch = architecture(BASE | NEOX)  # GELU, not gated
    build_config(arch, ParallelConfig(), overrides={"use_te_activation_func": False})
    with pytest.raises(UserError, match="gated SiLU only. Remove model.use_te_activation_func"):
        build_config(arch, ParallelConfig(), overrides={"use_te_activation_func": True})
