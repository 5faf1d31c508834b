"""The pure part of conversion: config translation, the name table, split and merge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_irl.convert.hf_config import architecture
from megatron_irl.errors import UserError
from megatron_irl.families.tensors import (
    FusedGateUp,
    FusedQkv,
    GateUp,
    Heads,
    Qkv,
    Replicated,
    Split,
    Vocabulary,
)

BASE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 40,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
}


@settings(deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]), groups=st.sampled_from([4, 8]), per_group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 6]), extra=st.sampled_from([(), (5,)]), seed=st.integers(0, 99),
)
def test_qkv_merge_undoes_split(tp, groups, per_group, head_dim, extra, seed):
    torch.manual_seed(seed)
    q = torch.randn(groups * per_group * head_dim, *extra)
    k, v = (torch.randn(groups * head_dim, *extra) for _ in range(2))
    heads = Heads(groups, head_dim)
    fused = torch.cat([q, k, v])
    for rank in range(tp):
        assert torch.equal(
            FusedQkv().read([fused], rank, tp, heads), Qkv().read([q, k, v], rank, tp, heads)
        )
    shards = [Qkv().read([q, k, v], rank, tp, heads) for rank in range(tp)]
    back = Qkv().write(shards, heads)
    assert all(torch.equal(a, b) for a, b in zip(back, (q, k, v), strict=True))
    assert torch.equal(FusedQkv().write(shards, heads)[0], fused)
    # Megatron's layout: a group's query rows, then its key, then its value.
    first = torch.cat([q[: per_group * head_dim], k[:head_dim], v[:head_dim]])
    assert torch.equal(shards[0][: len(first)], first)


@settings(deadline=None)
@given(tp=st.sampled_from([1, 2, 3, 4]), rows_=st.integers(1, 5), cols=st.integers(1, 5))
def test_other_transforms_merge_undoes_split(tp, rows_, cols):
    heads = Heads(1, 1)
    whole, other = torch.randn(tp * rows_, tp * cols), torch.randn(tp * rows_, tp * cols)
    for transform, sources in (
        (Split(0), [whole]), (Split(1), [whole]), (Replicated(), [whole]),
        (GateUp(), [whole, other]), (FusedGateUp(), [torch.cat([whole, other])]),
    ):
        shards = [transform.read(sources, rank, tp, heads) for rank in range(tp)]
        back = transform.write(shards, heads)
        assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True))


@settings(deadline=None)
@given(tp=st.integers(1, 8), vocab=st.integers(1, 40))
def test_a_vocabulary_is_padded_with_zeros(tp, vocab):
    whole = torch.randn(vocab, 3)
    shards = [Vocabulary().read([whole], rank, tp, Heads(1, 1)) for rank in range(tp)]
    assert {tuple(shard.shape) for shard in shards} == {(-(-vocab // tp), 3)}
    (back,) = Vocabulary().write(shards, Heads(1, 1))
    assert torch.equal(back[:vocab], whole) and not back[vocab:].any()


class Recorder:
    """Stands for a safetensors slice and adds up what is read from it."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, 0

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        self.read += self.tensor[index].numel()
        return self.tensor[index]


@pytest.mark.parametrize(
    "transform", [Qkv(), GateUp(), Split(0), Split(1), Vocabulary(), FusedQkv(), FusedGateUp()],
)
def test_a_rank_reads_only_what_it_owns(transform):
    q, k = torch.randn(16, 8), torch.randn(8, 8)
    several = {Qkv(): [q, k, k], GateUp(): [q, q], FusedQkv(): [torch.cat([q, k, k])]}
    whole = several.get(transform, [q])
    sources = [Recorder(tensor) for tensor in whole]
    shard = transform.read(sources, 3, 4, Heads(4, 2))
    assert sum(s.read for s in sources) == shard.numel() == sum(t.numel() for t in whole) // 4


def test_uneven_splits_are_not_cut_silently():
    with pytest.raises(AssertionError, match="not split by 2"):
        Split(0).read([torch.zeros(5, 2)], 0, 2, Heads(1, 1))
    with pytest.raises(AssertionError, match="3 query groups"):
        Qkv().read([torch.zeros(6, 2)] * 3, 0, 2, Heads(3, 2))


KINDS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2",
         "gemma3_text", "gpt_neox")
EXPERTS = {"num_local_experts": 14, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2, QWEN3 = {"architectures": ["Qwen2ForCausalLM"]}, {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
NEOX = {"architectures": ["GPTNeoXForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"mlp_bias": 1}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0},
          "rope_parameters": {"rope_type": "default"}}, "rope_parameters.*conflicts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"]}, "chunked"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64,
                  "layer_types": ["sliding_attention"]}, "layer_types has 1"),
        (MISTRAL | {"sliding_window": 64, "layer_types": ["full_attention"] * 2}, "full_attention"),
        (MISTRAL | {"sliding_window": "64"}, "sliding_window='64'"),
        (QWEN3, "head_dim is missing"),
        (QWEN2 | {"attention_bias": True}, "attention_bias"),
        (NEOX | {"attention_bias": False}, "attention_bias"),
        (NEOX | {"hidden_act": "quick_gelu"}, "quick_gelu"),
        (NEOX | {"rotary_pct": 1.5}, "rotary_pct=1.5"),
        (NEOX | {"num_attention_heads": 7}, "num_attention_heads=7"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
    ],
)
def test_unsupported_options_are_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        architecture(BASE | change)


def test_missing_key_is_named():
    config = {k: v for k, v in BASE.items() if k != "intermediate_size"}
    with pytest.raises(UserError, match="intermediate_size"):
        architecture(config)


PHI3 = {"architectures": ["Phi3ForCausalLM"], "head_dim": 8}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "head_dim": 16}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "head_dim": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (PHI3 | {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "llama3"),
        (PHI3 | {"rope_scaling": LONG}, "short_factor.*list of 4"),
        (PHI3 | {"rope_scaling": LONG | {"short_factor": "x"}}, "short_factor.*list of 4"),
        (GEMMA2 | {"hidden_activation": "silu"}, "hidden_activation silu"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2 | {"attention_bias": True}, "attention_bias"),
        (GEMMA2 | {"head_dim": None}, "head_dim=None"),
        (GEMMA2 | {"attn_logit_softcapping": -1}, "attn_logit_softcapping=-1"),
        (GEMMA2 | {"layer_types": ["full_attention"]}, "layer_types has 1"),
        (GEMMA2 | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        (GEMMA2 | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        (GEMMA3 | {"rope_parameters": {"rope_type": "default"}}, "rope_parameters has the keys"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ["Phi4MultimodalForCausalLM"]}, "Phi4Multimodal"),
    ],
)
def test_new_families_refuse_by_name(change, named):
    with pytest.raises(UserError, match=named):
        architecture(BASE | change)


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_follows_from_the_model_type(kind):
    """Configs that were written by hand, or by a trainer, may name no class."""
    config = {k: v for k, v in BASE.items() if k != "architectures"} | EXPERTS | {"head_dim": 16}
    for nothing in ({}, {"architectures": None}, {"architectures": []}):
        arch = architecture(config | nothing | {"model_type": kind})
        assert arch.family.lower().removesuffix("forcausallm") == (
            kind.removesuffix("_text").replace("_", ""))


def test_gemma_3_as_it_was_written_before_transformers_5():
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    old = BASE | GEMMA3 | {
        "num_hidden_layers": 7, "sliding_window": 32, "sliding_window_pattern": 3,
        "rope_theta": 2e5, "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    arch = architecture(old)
    assert arch.transformer["window_attn_skip_freq"] == [1, 1, 0, 1, 1, 0, 1]
    assert arch.local_rope_layers == (True, True, False, True, True, False, True)
    keys = {k: v for k, v in old.items() if k != "architectures"}
    expected = Gemma3RotaryEmbedding(Gemma3TextConfig(**keys))
    torch.testing.assert_close(arch.inv_freq, expected.full_attention_inv_freq)
    torch.testing.assert_close(arch.local_inv_freq, expected.sliding_attention_inv_freq)
    assert architecture(old | {"rope_scaling": None, "rope_theta": None}).rotary_base == 1e6


def test_gemma_keeps_what_its_config_leaves_out():
    """Hub files of Gemma state little; the rest are constants of transformers' class."""
    arch = architecture(BASE | GEMMA2)
    assert (arch.attention_softcap, arch.logit_softcap) == (50.0, 30.0)
    assert arch.tie_word_embeddings and arch.embedding_scale == 8.0
    assert arch.transformer["softmax_scale"] == 1 / 16
    assert "window_size" not in arch.transformer  # 4096 is beyond 128 positions
    assert architecture(BASE | GEMMA2 | {"sliding_window": 8}).transformer[
        "window_attn_skip_freq"] == [1, 0]
    assert architecture(BASE | GEMMA3).attention_softcap is None


def test_longrope_ends_where_its_short_factors_do():
    """A longer sequence would change the frequencies of all its tokens."""
    factors = LONG | {"short_factor": [1.0, 1.1, 1.2, 1.5]}
    arch = architecture(
        BASE | PHI3 | {"rope_scaling": factors, "original_max_position_embeddings": 64})
    assert arch.max_sequence_length == 64
    assert arch.rope_scale == pytest.approx((1 + 1 / 6) ** 0.5)  # ln 2 / ln 64


def test_options_that_change_nothing_are_accepted():
    for change in (
        QWEN2 | {"use_sliding_window": False, "sliding_window": 64},
        {"rope_scaling": None, "head_dim": None, "attention_bias": False, "pretraining_tp": 2},
        MISTRAL | {"sliding_window": None},
        MISTRAL | {"sliding_window": 128},
        {"layer_types": ["full_attention"] * 2},
    ):
        assert architecture(BASE | change).transformer["kv_channels"] == 8
    assert architecture(BASE | {"attention_dropout": 0.1}).transformer["attention_dropout"] == 0.0


@pytest.mark.parametrize(
    ("change", "window", "layers"),
    [
        (MISTRAL | {"max_position_embeddings": 8192}, 4096, None),
        (MISTRAL | {"sliding_window": 64}, 64, None),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64,
         [0, 1]),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 64, "head_dim": 8,
                  "layer_types": ["sliding_attention", "full_attention"]}, 64, [1, 0]),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64}, None, None),
    ],
)
def test_windows(change, window, layers):
    transformer = architecture(BASE | change).transformer
    assert transformer.get("window_size") == (window and (window - 1, 0))
    assert transformer.get("window_attn_skip_freq") == layers


def test_old_gpt_neox_configs_are_read():
    """Before transformers 5 the rotary keys had names of their own."""
    old = {k: v for k, v in BASE.items() if k != "rope_theta"} | NEOX | {
        "rotary_pct": 0.5, "rotary_emb_base": 2e4, "layer_norm_eps": 1e-5}
    arch = architecture(old)
    assert arch.parallel_residual and arch.rotary_percent == 0.5
    torch.testing.assert_close(arch.inv_freq, 2e4 ** -torch.tensor([0.0, 0.5]))
    assert architecture(BASE | NEOX).rotary_percent == 0.25
    assert not architecture(old | {"use_parallel_residual": False}).parallel_residual


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 20.0,
         "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.25},
    ],
)
def test_inverse_frequencies_equal_transformers(rope, key):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {k: v for k, v in BASE.items() if k != "rope_theta"} | {"head_dim": 64}
    if key == "rope_scaling":  # as transformers 4 wrote it
        plain["rope_theta"], rope = rope["rope_theta"], {
            k: v for k, v in rope.items() if k != "rope_theta"}
    expected = LlamaRotaryEmbedding(LlamaConfig(**plain, **{key: dict(rope)}))
    arch = architecture(plain | {key: rope})
    assert arch.inv_freq.dtype == torch.float32
    # yarn divides in another order than transformers does
    rounding = 3e-7 if rope["rope_type"] == "yarn" else 0.0
    torch.testing.assert_close(arch.inv_freq, expected.inv_freq, rtol=rounding, atol=0.0)
    assert arch.rope_scale == pytest.approx(expected.attention_scaling, rel=1e-12)
