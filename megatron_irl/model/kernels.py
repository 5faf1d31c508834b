"""What a run computes with: layers, attention kernels and library versions, said before it starts.

The slow ways are silent upstream. Transformer Engine falls back to its unfused attention (half the
speed, twice the memory) when cuDNN cannot run its fused one, and the engine's attention falls back
to ``paged_attention`` where flash-attn is missing.
"""

import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megatron_irl import hardware
from megatron_irl.errors import UserError
from megatron_irl.hardware import paged_attention
from megatron_irl.model.packed_attention import PackedAttention

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer import attention as upstream  # isort: skip
from megatron.core.transformer.enums import AttnBackend, AttnMaskType  # isort: skip

UNFUSED, FALLBACK, LOCAL = "unfused", "SDPA fallback", "SDPA"


def _switches(flash: str, fused: str, unfused: str) -> dict[str, str]:
    return {"NVTE_FLASH_ATTN": flash, "NVTE_FUSED_ATTN": fused, "NVTE_UNFUSED_ATTN": unfused}


# What Megatron-Core's models set for each of its backends.
SWITCHES = {
    AttnBackend.auto: _switches("1", "1", "1"), AttnBackend.flash: _switches("1", "0", "0"),
    AttnBackend.fused: _switches("0", "1", "0"), AttnBackend.unfused: _switches("0", "0", "1"),
    AttnBackend.local: _switches("0", "0", "0"),
}


@dataclass(frozen=True)
class Kernels:
    """What a run computes with.

    Attributes:
        layers: ``transformer_engine`` or ``local``.
        training_attention: ``fused (cuDNN)``, ``flash-attn`` or ``unfused`` within Transformer
            Engine's layers; ``SDPA`` of torch within the local ones.
        generation_attention: ``flash-attn 4``, ``3`` or ``2``; ``SDPA fallback`` where it is
            missing; ``SDPA`` where there is nothing better (fp32, CPU).
        decoding: ``CUDA graphs``, or ``eager`` with the reason. How many graphs a round captured
            is among its metrics.
        versions: Of the libraries behind them, where installed.
    """

    layers: str
    training_attention: str
    generation_attention: str
    decoding: str
    versions: dict[str, str]

    def line(self) -> str:
        """One line for the log."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        said = (f"layers: {self.layers}; attention: {self.training_attention} in training, "
                f"{self.generation_attention} in generation; decoding: {self.decoding}")
        return f"{said}; {versions}" if versions else said

    def as_dict(self) -> dict[str, Any]:
        """The fields, for ``run.json``."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """What is slower than it need be, each with its remedy."""
        found = []
        if self.training_attention == UNFUSED:
            found.append(
                "training attends through Transformer Engine's UNFUSED attention: about half the "
                "speed and twice the memory. Usually two versions of cuDNN mix: set CUDNN_HOME to "
                "the one that torch brought (.../site-packages/nvidia/cudnn), or run in NVIDIA's "
                "container. NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 tells why."
            )
        if self.generation_attention == FALLBACK:
            found.append(
                "generation attends through torch's SDPA, because flash-attn (2.7.3 or newer) is "
                "not installed: slower, and without CUDA graphs. Install flash-attn, or run in "
                "NVIDIA's container."
            )
        return found


def check_environment(backend: AttnBackend) -> None:
    """Refuse Transformer Engine's switches for attention where Megatron-Core would assert on them.

    Megatron sets them itself, by ``model.attention_backend``; the values it sets are no conflict.

    Raises:
        UserError: One is set to something else.
    """
    wanted = SWITCHES.get(backend)
    if wanted is None:
        return
    found = [
        f"{name}={os.environ[name]}" for name, value in wanted.items()
        if os.environ.get(name, value) != value
    ]
    if found:
        raise UserError(
            f"{', '.join(found)} in the environment conflicts with model.attention_backend="
            f"{backend.name}, which decides which attention runs. Unset "
            f"{', '.join(entry.partition('=')[0] for entry in found)}."
        )


def describe_kernels(model: Any, *, layers: str, not_captured: str | None) -> Kernels:
    """Find out what a model (a GPTModel, or any stage of one) computes with.

    Transformer Engine is asked by a forward through the first layer's attention on a few random
    tokens, so it says what it takes for this model, on this machine. No gradient is kept.

    Args:
        layers: The layer spec the model was built with.
        not_captured: Why decode steps run without CUDA graphs, if they do.
    """
    decoding = f"eager ({not_captured})" if not_captured else "CUDA graphs"
    return Kernels(
        layers, _training_attention(model), _generation_attention(model), decoding, _versions()
    )


def _training_attention(model: Any) -> str:
    core = next(
        (m for name, m in model.named_modules() if name.endswith("core_attention")), None
    )
    if core is None or isinstance(core, PackedAttention) or not hardware.IS_CUDA:
        return LOCAL
    _probe(core)
    from transformer_engine.pytorch.attention.dot_product_attention import (
        dot_product_attention as chosen,
    )

    return attention_name(getattr(chosen, "_attention_backends", {}))


def attention_name(backends: dict[str, Any]) -> str:
    """The name of what Transformer Engine selected last, from its own record."""
    if backends.get("use_fused_attention"):
        return "fused (cuDNN)"
    if backends.get("use_flash_attention"):
        return "flash-attn"
    return UNFUSED if backends.get("use_unfused_attention") else "unknown"


def _probe(core: Any) -> None:
    """Two packed sequences through Transformer Engine's attention, as a training step has them."""
    config, device = core.config, hardware.device()
    size = config.tensor_model_parallel_size
    heads, groups = config.num_attention_heads // size, config.num_query_groups // size
    bounds = torch.tensor([0, 40, 64], dtype=torch.int32, device=device)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=40,
        max_seqlen_kv=40,
    )
    # Random numbers of its own: the run's generators must not move.
    generator = torch.Generator(device=device).manual_seed(0)
    query, key = (
        torch.randn(64, n, config.kv_channels, generator=generator, device=device,
                    dtype=config.params_dtype).requires_grad_()
        for n in (heads, groups)
    )
    core(query, key, key, None, AttnMaskType.causal, packed_seq_params=packed)


def _generation_attention(model: Any) -> str:
    config = model.config
    if not hardware.IS_CUDA or config.params_dtype == torch.float32:
        return LOCAL
    pinned = getattr(config, "flash_attention_version", None)
    for number, installed in ((4, upstream.HAVE_FA4), (3, upstream.HAVE_FA3)):
        if installed and pinned in (None, number):
            return f"flash-attn {number}"
    found = upstream.flash_attn_with_kvcache  # None, or what stands in for it, without flash-attn
    missing = found in (None, paged_attention.flash_attn_with_kvcache)
    return FALLBACK if missing else "flash-attn 2"


def _versions() -> dict[str, str]:
    names = ("transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4")
    found = {name: number for name in names if (number := _version(name))}
    return found | hardware.library_versions()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
