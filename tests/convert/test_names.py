"""Names of parameters: in transformers, in either spec of Megatron, and in its checkpoints."""

import torch

from megatron_irl.convert.hf_config import architecture
from megatron_irl.families.table import (
    canonical,
    is_extra_state,
    rows,
    spellings,
    stored_name,
)
from tests.convert.family_jobs import as_stored
from tests.convert.test_table import BASE, EXPERTS, KINDS

MIXTRAL = EXPERTS | {"architectures": ["MixtralForCausalLM"]}


def test_table_names_every_parameter_of_transformers():
    """Names, shapes and completeness, against the models themselves."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in KINDS:
        keys = {k: v for k, v in BASE.items() if k != "architectures"}
        if kind != "gpt_neox":
            keys |= {"head_dim": 8, "sliding_window": None}
        if kind == "llama":
            keys |= {"attention_bias": True, "mlp_bias": True}
        if sparse := kind in ("mixtral", "qwen3_moe"):
            keys |= EXPERTS
        config = AutoConfig.for_model(kind, pad_token_id=0, eos_token_id=1, **keys)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        arch = architecture(config.to_dict() | {"architectures": [type(model).__name__]})
        parameters = dict(model.named_parameters())
        if sparse:  # one tensor in the model, in files one for each expert
            parameters = as_stored(parameters, mixtral=kind == "mixtral")
        expected = {n: tuple(p.shape) for n, p in parameters.items()}
        if kind == "gpt_neox":  # renamed on loading; files have kept the old name
            expected["embed_out.weight"] = expected.pop("lm_head.weight")
        assert {t.name: t.shape(arch) for row in rows(arch) for t in row.hf} == expected


def test_fused_norms_have_the_same_canonical_name():
    layer = "decoder.layers.7."
    assert canonical(layer + "self_attention.linear_qkv.layer_norm_weight") == (
        layer + "input_layernorm.weight")
    assert canonical(layer + "mlp.linear_fc1.layer_norm_weight") == (
        layer + "pre_mlp_layernorm.weight")
    assert canonical(layer + "mlp.linear_fc1.weight") == layer + "mlp.linear_fc1.weight"


def test_experts_have_the_same_names_under_either_spec():
    """Transformer Engine has one module for all of a layer, Megatron one module for each."""
    experts, arch = "decoder.layers.7.mlp.experts.", architecture(BASE | MIXTRAL)
    for number, part in ((0, "linear_fc1"), (13, "linear_fc2")):
        name = f"{experts}local_experts.{number}.{part}.weight"
        assert canonical(f"{experts}{part}.weight{number}") == canonical(name) == name
        assert stored_name(name, arch) == (
            f"decoder.layers.mlp.experts.experts.{part}.weight", {"layers": 7, "experts": number})
        extra = f"{experts}{part}._extra_state{number or ''}"
        assert is_extra_state(extra) and canonical(extra) == extra and not is_extra_state(name)


def test_norms_are_stored_as_transformer_engine_has_them():
    """Fused with the layer after them, except where experts follow."""
    norms = {"input_layernorm": "self_attention.linear_qkv.layer_norm_weight"}
    for config, before_mlp in (
        ({}, "mlp.linear_fc1.layer_norm_weight"), (MIXTRAL, "pre_mlp_layernorm.weight")
    ):
        for norm, stored in (norms | {"pre_mlp_layernorm": before_mlp}).items():
            arch = architecture(BASE | config)
            name, place = stored_name(f"decoder.layers.1.{norm}.weight", arch)
            assert (name, place) == (f"decoder.layers.{stored}", {"layers": 1})
            assert f"decoder.layers.{norm}.weight" in spellings(name)
            assert name in spellings(f"decoder.layers.{norm}.weight")
