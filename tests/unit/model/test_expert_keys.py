"""What a recipe may say of experts."""

import pytest

from megatron_irl.config import ParallelConfig
from megatron_irl.errors import UserError
from megatron_irl.families.registry import architecture
from megatron_irl.model.build import build_config

DENSE = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None,
}
MIXTRAL = DENSE | {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
}
QWEN = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": False,
}


def config(hf_config, parallel=None, **overrides):
    return build_config(
        architecture(hf_config), parallel or ParallelConfig(), overrides=overrides
    )


def test_fields_of_megatrons_config():
    mixtral, qwen = config(MIXTRAL), config(QWEN)
    assert (mixtral.num_moe_experts, mixtral.moe_router_topk) == (4, 2)
    assert mixtral.moe_ffn_hidden_size == mixtral.ffn_hidden_size == 128
    assert not mixtral.moe_router_pre_softmax and qwen.moe_router_pre_softmax
    assert qwen.moe_ffn_hidden_size == qwen.ffn_hidden_size == 32  # and not intermediate_size
    assert not config(QWEN | {"norm_topk_prob": True}).moe_router_pre_softmax
    newer = {k: v for k, v in QWEN.items() if k != "num_experts"} | {"num_local_experts": 8}
    assert config(newer).num_moe_experts == 8
    assert qwen.moe_router_dtype == "fp32"
    assert config(QWEN, moe_router_dtype="fp64").moe_router_dtype == "fp64"


@pytest.mark.parametrize(("hf_config", "overrides", "message"), [
    (MIXTRAL, {"moe_aux_loss_coeff": 0.01}, "split into microbatches. Remove model.moe_aux_loss"),
    (MIXTRAL, {"moe_expert_capacity_factor": 1.5}, "tokens are dropped"),
    (MIXTRAL, {"moe_router_force_load_balancing": True}, "by chance. Remove model.moe_rout"),
    (QWEN, {"moe_mlp_glu_interleave_size": 16}, "interleaves gate and up"),
    (QWEN, {"moe_router_topk_scaling_factor": 2.5}, "=2.5 is not supported"),
    (MIXTRAL, {"moe_router_group_topk": 1, "moe_router_num_groups": 2}, "among all experts"),
    (MIXTRAL, {"moe_router_load_balancing_type": "sinkhorn"}, "=sinkhorn is not supported"),
    (MIXTRAL, {"moe_token_dispatcher_type": "allgather"}, "only alltoall allows"),
    (MIXTRAL, {"moe_single_grouped_weight": True}, "one weight of all experts'"),
    (QWEN, {"moe_single_grouped_bias": True}, "has experts with biases"),
    (QWEN, {"use_transformer_engine_op_fuser": True}, "pass by the modules of the experts"),
    (MIXTRAL, {"num_moe_experts": 8}, "conflicts with config.json"),
    (MIXTRAL, {"moe_router_topk": 3}, "conflicts with config.json"),
    (DENSE, {"num_moe_experts": 8}, "has no experts. Remove model.num_moe_experts"),
    (DENSE, {"moe_router_topk": 3}, "has no experts. Remove model.moe_router_topk"),
])
def test_keys_refused(hf_config, overrides, message):
    with pytest.raises(UserError, match=message):
        config(hf_config, **overrides)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 conflicts with num_experts=8"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size=None; it must be"),
])
def test_folders_refused(changes, message):
    with pytest.raises(UserError, match=message):
        architecture(QWEN | changes)


def test_tensor_parallelism_needs_sequence_parallelism():
    tp2 = {"tensor_model_parallel_size": 2}
    with pytest.raises(UserError, match="4 experts a layer.*sequence_parallel to true"):
        config(MIXTRAL, ParallelConfig(**tp2))
    assert config(MIXTRAL, ParallelConfig(**tp2, sequence_parallel=True)).sequence_parallel
