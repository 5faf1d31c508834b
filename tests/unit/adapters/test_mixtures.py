"""Which layers of a model with experts have adapters, and what of it a checkpoint holds."""

import json

import pytest
from torch import nn

from megatron_irl.adapters.sharding import save_adapters_only
from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.config import AdapterConfig, ParallelConfig
from megatron_irl.convert.hf_config import architecture
from megatron_irl.convert.peft_folder import PeftFolder
from megatron_irl.errors import UserError
from megatron_irl.families.linears import target_names, targeted_layers

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 40,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "num_local_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}
QWEN3 = MIXTRAL | {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 5,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "tie_word_embeddings": True,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3], ids=["mixtral", "qwen3"])
def test_all_linear_is_attention(config):
    """Two layers of Megatron's (q, k and v are one) in each of three; the head by its name only."""
    arch = architecture(config)
    layers = targeted_layers(arch, ["all-linear"])
    assert [layer.row.megatron for layer in layers] == [
        f"decoder.layers.{n}.self_attention.{name}.weight"
        for n in range(3) for name in ("linear_qkv", "linear_proj")
    ]
    assert [layer.parts for layer in layers] == 3 * [(0, 1, 2), (0,)]
    assert target_names(arch) == ATTENTION + ([] if arch.tie_word_embeddings else ["lm_head"])


@pytest.mark.parametrize(("config", "names"), [
    (MIXTRAL, ("w1", "w2", "w3", "gate", "experts.0.w1", "gate_up_proj")),
    (QWEN3, ("gate_proj", "up_proj", "down_proj", "mlp.gate")),
], ids=["mixtral", "qwen3"])
def test_experts_and_router_are_refused_by_name(config, names):
    arch = architecture(config)
    for name in names:
        with pytest.raises(UserError) as caught:
            targeted_layers(arch, ["q_proj", name])
        text = str(caught.value)
        assert f"adapter.targets={name} " in text and "router and its experts take none" in text
        assert ("tie_word_embeddings" in text) is arch.tie_word_embeddings
        assert "Set adapter.targets" in text


def test_an_adapter_of_a_folder_is_refused_by_its_path(tmp_path):
    """As transformers 4 and peft had them: a module for every expert."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w2"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        adapter_spec(AdapterConfig(path=str(tmp_path)), architecture(MIXTRAL), ParallelConfig(),
                     seed=0)
    assert f"{tmp_path}: target_modules=w2 " in str(caught.value)
    assert "Give an adapter of some of these" in str(caught.value)
    config |= {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"],
               "rank_pattern": {".*gate_up_proj": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="target_parameters=.*experts"):
        PeftFolder.read(tmp_path)


def test_checkpoints_hold_the_extra_state_of_every_expert():
    """Transformer Engine numbers them from the second on; Megatron refuses to save some of them."""
    class Chunk(nn.Module):
        def sharded_state_dict(self, prefix="", _offsets=(), _metadata=None):
            return dict.fromkeys(
                f"{prefix}decoder.layers.0.{name}" for name in (
                    "mlp.experts.linear_fc1.weight0", "mlp.experts.linear_fc1._extra_state",
                    "mlp.experts.linear_fc1._extra_state1", "mlp.router.weight",
                    "self_attention.linear_qkv._extra_state",
                )
            )

    chunk = Chunk()
    save_adapters_only(chunk, {}, None)
    layer = "module.decoder.layers.0."
    assert set(chunk.sharded_state_dict("module.")) == {
        f"{layer}mlp.experts.linear_fc1._extra_state",
        f"{layer}mlp.experts.linear_fc1._extra_state1",
        f"{layer}self_attention.linear_qkv._extra_state",
    }
