"""Random-weight models of well-known shapes, and what a step of them must compute and read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.adapters.adapters import Adapters
from megatron_irl.config import ParallelConfig, Precision
from megatron_irl.convert.hf_config import architecture
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.table import HEAD
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import Topology
from megatron_irl.train.batches import num_tokens
from megatron_irl.types import Pair

PEAK_FLOPS = 989e12  # bf16, dense, of an H100 SXM
BANDWIDTH = 3.35e12  # bytes a second of its memory

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
          "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "tie_word_embeddings": False, "initializer_range": 0.02}
_8B = _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "200M": _LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
                      "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000},
    "1.1B": _LLAMA | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "8B/4": _8B | {"num_hidden_layers": 8},  # an 8B's shape with a quarter of the layers: 2.8 B
    "8B": _8B | {"num_hidden_layers": 32},
}


def shape(name: str) -> Architecture:
    """The architecture of a name in ``SHAPES``."""
    return architecture(SHAPES[name])


def build_random(
    name: str, precision: Precision, topology: Topology, **overrides: Any
) -> tuple[list[Any], Any]:
    """(model chunks with random weights on the device, Megatron's config); no folder is written.

    Args:
        overrides: ``model:`` keys of a recipe.
    """
    arch = shape(name)
    config = build_config(arch, ParallelConfig(), precision=precision, overrides=overrides)
    chunks = build_chunks(config, arch, topology)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    return chunks, config


def build_transformers(name: str) -> Any:
    """The same shape in transformers, random bf16 weights on the device, SDPA attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in SHAPES[name].items() if k not in ("architectures", "model_type")}
    config = AutoConfig.for_model(SHAPES[name]["model_type"], **options)
    with torch.device(hardware.device()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def layer_parameters(arch: Architecture) -> int:
    """Weights of all matrices of the layers, as used for every token."""
    dims, layers = arch.dims, arch.transformer["num_layers"]
    attention = dims["hidden"] * (dims["qkv"] + dims["q"])
    return layers * (attention + 3 * dims["hidden"] * dims["ffn"])


def adapter_parameters(adapters: Adapters) -> tuple[int, int]:
    """Parameters of adapters of layers, and of the head's."""
    sizes = [(name == HEAD, sum(p.numel() for p in layer.adapter.parameters()))
             for name, layer in adapters.layers.items()]
    return (sum(size for is_head, size in sizes if not is_head),
            sum(size for is_head, size in sizes if is_head))


def training_flops(
    arch: Architecture, pairs: Sequence[Pair], *, adapters: tuple[int, int] | None = None
) -> float:
    """Model FLOPs of forward and backward over pairs.

    6 a layer weight and token, 6 an LM-head weight and response token, and for causal attention 12
    a layer, head dimension and half the square of a sequence's length. Recomputation is not work.

    Args:
        adapters: Of a frozen model, as ``adapter_parameters`` counts them: then 4 a frozen weight,
            whose own gradient is not computed, and 6 an adapter's.
    """
    dims, layers = arch.dims, arch.transformer["num_layers"]
    lengths = [len(p.prompt_ids) + len(ids) for p in pairs for ids in (p.demo_ids, p.sample_ids)]
    response = sum(len(p.demo_ids) + len(p.sample_ids) for p in pairs)
    squares = sum(n * n for n in lengths) / 2
    tokens, each = sum(map(num_tokens, pairs)), 6.0 if adapters is None else 4.0
    layers_added, head_added = adapters or (0, 0)
    return (each * layer_parameters(arch) * tokens + 6.0 * layers_added * tokens
            + each * dims["hidden"] * dims["vocab"] * response + 6.0 * head_added * response
            + 12.0 * layers * dims["q"] * squares)


def random_pairs(
    arch: Architecture, count: int, seed: int, *, low: int = 256, high: int = 512
) -> list[Pair]:
    """Pairs of random ids; prompts and responses of ``low`` to ``high`` tokens."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(3, arch.vocab_size, rng.integers(low, high + 1)).astype(np.int32)

    return [
        Pair(i, ids(), ids(), ids(), np.zeros(1, np.float32), "stop",
             ref_demo_logp=-50.0, ref_sample_logp=-50.0)
        for i in range(count)
    ]
