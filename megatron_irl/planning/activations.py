"""What one microbatch keeps and needs on a pipeline stage, found by running the stage's layers.

The layers of the stage are Megatron's own, on fake tensors (``fake_world``): forward, backward, and
whatever recomputation the recipe asks for. Memory is linear in layers of one kind, so that a few
are enough.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.adapters.adapters import add_adapters
from megatron_irl.adapters.spec import AdapterSpec, adapter_spec
from megatron_irl.config import ParallelConfig, Precision
from megatron_irl.config.schema import AdapterConfig
from megatron_irl.data.packing import pack
from megatron_irl.families.architecture import Architecture
from megatron_irl.flops import Tokens
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.local_layers import PackedRotaryEmbedding
from megatron_irl.model.packed_attention import padded_layout
from megatron_irl.model.shared_prompts import SHARED
from megatron_irl.parallel.topology import Topology
from megatron_irl.planning.even_routing import even_routing
from megatron_irl.planning.fake_world import Ledger, fake_tensors, fake_world
from megatron_irl.planning.lean_modules import like_transformer_engine
from megatron_irl.types import SharedPrompts

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip

LAYERS = "decoder.layers."
Attach = Callable[[list[Any], Topology], None]


@dataclass(frozen=True)
class Footprint:
    """Bytes that one microbatch takes on one model chunk of a rank, beside its weights.

    Attributes:
        kept: From the end of its forward pass to its backward pass.
        forward: Most at once in a forward pass that keeps nothing (no gradient).
        backward: Most at once in the backward pass, beyond ``kept``.
    """

    kept: int
    forward: int
    backward: int


def footprint(
    config: Any, arch: Architecture, topology: Topology, lengths: list[int],
    attach: Attach | None = None, *, sharing: int = 1,
) -> list[Footprint]:
    """Of each chunk of this rank, for a microbatch of sequences of these lengths; without the head.

    Within ``fake_world``; with ``like_transformer_engine`` as its layers would have it.

    Args:
        sharing: How many neighbours, equally long ones, have their first half in common.
    """
    multiple = topology.tp_size if config.sequence_parallel else 1
    ids = [np.zeros(length, np.int64) for length in lengths]
    batch = pack([(i[: len(i) // 2], i[len(i) // 2 :]) for i in ids], None, multiple_of=multiple,
                 sharing=[sharing] * (len(ids) // sharing))
    cu_seqlens = batch.cu_seqlens.numpy()
    layout = padded_layout(cu_seqlens.tolist(), torch.device("cpu"))
    with fake_tensors() as mode, even_routing():
        chunks: list[Any] = build_chunks(config, arch, topology, spec="local")
        if attach is not None:
            attach(chunks, topology)
        packed = PackedSeqParams(
            # Sizes that are read on the host stand in numpy: fake tensors have no values.
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,  # pyright: ignore
            max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen,
        )
        packed.padded_layout = None if layout is None else tuple(map(mode.from_tensor, layout))
        if batch.shared is not None:
            indices = map(mode.from_tensor, vars(batch.shared).values())
            setattr(packed, SHARED, SharedPrompts(*indices))
        tokens, places = batch.tokens_T.shape[1], int(cu_seqlens[-1])
        return [_of_chunk(chunk, packed, tokens, places, config) for chunk in chunks]


def _of_chunk(
    chunk: Any, packed: PackedSeqParams, total: int, places: int, config: Any
) -> Footprint:
    tokens, positions = (torch.zeros(1, n, dtype=torch.long) for n in (total, places))
    for parameter in chunk.parameters():  # Megatron's DDP adds gradients to its buffer, and frees
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    if isinstance(chunk.rotary_pos_emb, PackedRotaryEmbedding):
        chunk.rotary_pos_emb.positions = positions[0]
    chunk.train()
    share = total // (config.tensor_model_parallel_size if config.sequence_parallel else 1)

    def run() -> Tensor:
        if not chunk.pre_process:
            received = torch.empty(share, 1, config.hidden_size, dtype=config.params_dtype)
            chunk.set_input_tensor(received.requires_grad_())
        return chunk(
            input_ids=tokens, position_ids=tokens, attention_mask=None, packed_seq_params=packed,
            output_processor=_hidden_states, output_processor_context=None,
        )

    run()  # tables of angles are made once and kept
    known = [*chunk.parameters(), *chunk.buffers(), tokens, positions]
    with Ledger(known) as ledger, torch.no_grad():
        output = run()
        forward = ledger.peak
        del output
    with Ledger(known) as ledger:
        output = run()
        kept = ledger.live
        ledger.reset_peak()
        torch.autograd.backward(output, torch.empty_like(output))
        return Footprint(kept, forward, max(0, ledger.peak - kept))


def _hidden_states(*, hidden_states: Tensor, **_: Any) -> Tensor:
    """The output processor of a chunk whose head is counted elsewhere."""
    return hidden_states


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def parameters_of_stage(
    config: Any, arch: Architecture, topology: Topology, attach: Attach | None = None, *,
    times: int = 1,
) -> dict[str, tuple[int, int, bool]]:
    """By name: elements of every parameter of this rank, bytes of one, and whether it is trained.

    Within ``fake_world``.

    Args:
        attach: Given the chunks, adds what they have beside the language model.
        times: How many layers of the rank each one of these chunks' stands for.
    """
    with fake_tensors():
        chunks = build_chunks(config, arch, topology, spec="local")
        if attach is not None:
            attach(chunks, topology)
    return {
        f"{i}.{name}": (
            parameter.numel() * (times if name.startswith(LAYERS) else 1),
            parameter.element_size(), parameter.requires_grad,
        )
        for i, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()
    }


@dataclass(frozen=True)
class Again:
    """Bytes for a place of attention's sequences beyond the tokens of a microbatch.

    Attributes:
        layer, forward, backward: As of ``PerToken``.
    """

    layer: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class PerToken:
    """A stage's footprint by token of a microbatch, on one tensor-parallel rank.

    Attributes:
        layer: Bytes that one layer keeps.
        edge: Bytes that stand at the ends of a chunk: what comes in, the embedding's, and what
            goes out, the final norm's.
        forward, backward: As in ``Footprint``.
        gradients: Bytes of weight gradients on the way to Megatron's buffer, whatever the tokens.
        again: For every token of a shared prompt that attention sees again.
    """

    layer: float
    edge: float
    forward: float
    backward: float
    gradients: float
    again: "Again"

    def kept(self, pack: Tokens, layers: float, *, chunks: int) -> float:
        """Bytes that so many layers keep of a microbatch, in so many chunks.

        Between two chunks stands what is passed on, about half of what the model's ends keep.
        """
        edges = (1 + (chunks - 1) / 2) * self.edge
        return pack.sum * (layers * self.layer + edges) + pack.again * layers * self.again.layer


def per_token(
    arch: Architecture, precision: Precision, overrides: dict[str, Any], *, tp: int,
    ep: int = 1, sequence_parallel: bool, lean: bool, lengths: tuple[int, ...],
    adapter: AdapterConfig | None = None,
) -> PerToken:
    """What layers keep, from a model of a few of them on one pipeline stage.

    Args:
        overrides: ``model:`` keys of the recipe.
        lean: As Transformer Engine's kernels would have it.
        lengths: Of a microbatch's sequences. What is kept is linear in them as far as attention
            keeps no scores.
        adapter: What is trained alone, if it is.
    """
    overrides = {k: v for k, v in overrides.items() if k not in ("fp8_recipe", "fp8")}
    overrides = overrides | {"recompute_modules": _recomputable(overrides)} if overrides.get(
        "recompute_modules") else overrides
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep,
        sequence_parallel=sequence_parallel,
    )
    plain: Precision = "bf16" if precision == "fp8" else precision
    together = overrides.get("recompute_num_layers") or 1

    def look(layers: int, times: int, sharing: int = 1) -> Footprint:
        model = shallow(arch, layers)
        stand_ins = like_transformer_engine() if lean else nullcontext()
        with fake_world(parallel) as topology, stand_ins:
            config = build_config(
                model, parallel, precision=plain, overrides=overrides, check_hardware=False
            )
            attach = attach_adapter(adapter, model, parallel)
            (chunk,) = footprint(
                config, model, topology, list(lengths) * times, attach, sharing=sharing)
            return chunk

    tokens, one, two, long = sum(lengths), look(together, 1), look(2 * together, 1), look(
        2 * together, 2)
    layer = (two.kept - one.kept) / together
    backward = (long.backward - two.backward) / tokens
    known = PerToken(
        layer / tokens, max(0.0, one.kept - together * layer) / tokens,
        (long.forward - two.forward) / tokens, backward,
        # Transformer Engine's layers add theirs to the buffer as they compute them.
        0.0 if lean else max(0.0, two.backward - backward * tokens), Again(),
    )
    shared = look(2 * together, 2, sharing=2)
    return replace(known, again=_again(known, shared, long, 2 * together, lengths))


def _again(
    known: PerToken, shared: Footprint, apart: Footprint, layers: int, lengths: tuple[int, ...]
) -> Again:
    """By what two microbatches take that share the first halves of their sequences, and apart."""
    again = sum(length // 2 for length in lengths)
    kept = shared.kept - apart.kept + again * (layers * known.layer + known.edge)
    forward = shared.forward - apart.forward + again * known.forward
    backward = shared.backward - apart.backward + again * known.backward
    return Again(*(max(0.0, n) / again for n in (kept / layers, forward, backward)))


def attach_adapter(
    adapter: AdapterConfig | None, arch: Architecture, parallel: ParallelConfig
) -> Attach | None:
    """What gives chunks the adapters of a recipe, with nothing in them."""
    if adapter is None:
        return None
    spec = adapter_spec(adapter, arch, parallel, seed=0)
    assert spec is not None
    # What they begin with is of no matter here, and fake tensors hold nothing.
    bare = replace(spec, start=None, dropout=0.0)
    return lambda chunks, topology: _add_bare(chunks, bare, arch, topology)


def _add_bare(
    chunks: list[Any], spec: AdapterSpec, arch: Architecture, topology: Topology
) -> None:
    add_adapters(chunks, spec, arch, topology)


def _recomputable(overrides: dict[str, Any]) -> list[str]:
    """Without those that Megatron recomputes with Transformer Engine alone: counted as kept."""
    return [name for name in overrides["recompute_modules"] if name in ("core_attn", "mlp", "moe")]


def shallow(arch: Architecture, layers: int) -> Architecture:
    """The same model with fewer layers."""
    return replace(
        arch, transformer=arch.transformer | {"num_layers": layers},
        local_rope_layers=arch.local_rope_layers[:layers],
    )
