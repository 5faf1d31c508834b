"""What one microbatch keeps and needs on a pipeline stage, found by running the stage's layers.

The layers of the stage are Megatron's own, on fake tensors (``fake_world``): forward, backward, and
whatever recomputation the recipe asks for. Memory is linear in layers of one kind, so that a few
are enough.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    attach: Attach | None = None, *, shared: float | None = None,
) -> list[Footprint]:
    """Of each chunk of this rank, for a microbatch of sequences of these lengths; without the head.

    Within ``fake_world``; with ``like_transformer_engine`` as its layers would have it.

    Args:
        shared: Such a share of each is a prompt that two neighbours, equally long ones, have in
            common; None: no prompts are shared.
    """
    multiple = topology.tp_size if config.sequence_parallel else 1
    halves = _halves(lengths, 0.5 if shared is None else shared)
    batch = pack([(np.zeros(p, np.int64), np.zeros(r, np.int64)) for p, r in halves], None,
                 multiple_of=multiple,
                 sharing=None if shared is None else [2] * (len(lengths) // 2))
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
            known = batch.shared
            rows, first, again = map(
                mode.from_tensor, (known.rows_A, known.first_T, known.again_B))
            setattr(packed, SHARED, SharedPrompts(rows, first, again, known.at_most))
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


class Linear(NamedTuple):
    """Bytes of a microbatch that shares prompts: for a token, and for a place of attention more."""

    token: float = 0.0
    again: float = 0.0

    def of(self, pack: Tokens) -> float:
        return pack.sum * self.token + pack.again * self.again

    @classmethod
    def through(cls, points: Sequence[tuple[float, float, float]]) -> "Linear":
        """Through two of (tokens, places more, bytes); between them more than what is there, as
        what takes most is one thing or the other.
        """
        (t, a, x), (u, b, y) = points
        return cls((x * b - y * a) / (t * b - u * a), (y * t - x * u) / (t * b - u * a))


@dataclass(frozen=True)
class PerToken:
    """A stage's footprint by token of a microbatch, on one tensor-parallel rank.

    Attributes:
        layer: Bytes that one layer keeps.
        edge: Bytes that stand at the ends of a chunk: what comes in, the embedding's, and what
            goes out, the final norm's.
        forward, backward: As in ``Footprint``.
        gradients: Bytes of weight gradients on the way to Megatron's buffer, whatever the tokens.
        shared: The first, third and fourth where prompts are shared.
    """

    layer: float
    edge: float
    forward: float
    backward: float
    gradients: float
    shared: tuple[Linear, Linear, Linear] = (Linear(), Linear(), Linear())

    def kept(self, pack: Tokens, layers: float, *, chunks: int) -> float:
        """Bytes that so many layers keep of a microbatch, in so many chunks.

        Between two chunks stands what is passed on, about half of what the model's ends keep.
        """
        layer = max(pack.sum * self.layer, self.shared[0].of(pack) if pack.again else 0.0)
        return layers * layer + pack.sum * (1 + (chunks - 1) / 2) * self.edge

    def forward_of(self, pack: Tokens) -> float:
        """Bytes at once of a microbatch in a forward pass that keeps nothing."""
        return max(pack.sum * self.forward, self.shared[1].of(pack) if pack.again else 0.0)

    def backward_of(self, pack: Tokens) -> float:
        """Bytes at once of a microbatch in its backward pass, beyond those kept."""
        return max(pack.sum * self.backward, self.shared[2].of(pack) if pack.again else 0.0)


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

    def look(layers: int, times: int, shared: float | None = None) -> Footprint:
        model = shallow(arch, layers)
        stand_ins = like_transformer_engine() if lean else nullcontext()
        with fake_world(parallel) as topology, stand_ins:
            config = build_config(
                model, parallel, precision=plain, overrides=overrides, check_hardware=False
            )
            attach = attach_adapter(adapter, model, parallel)
            (chunk,) = footprint(
                config, model, topology, [n for n in lengths for _ in range(times)], attach,
                shared=shared,
            )
            return chunk

    tokens, one, two, long = sum(lengths), look(together, 1), look(2 * together, 1), look(
        2 * together, 2)
    layer = (two.kept - one.kept) / together
    backward = (long.backward - two.backward) / tokens
    known = PerToken(
        layer / tokens, max(0.0, one.kept - together * layer) / tokens,
        (long.forward - two.forward) / tokens, backward,
        # Transformer Engine's layers add theirs to the buffer as they compute them.
        0.0 if lean else max(0.0, two.backward - backward * tokens),
    )
    fixed = two.forward - known.forward * tokens
    points = [
        (Tokens.of([n for n in _halves(lengths, share) for _ in range(2)], sharing=2),
         look(2 * together, 2, share)) for share in (0.5, 0.9)
    ]
    return replace(known, shared=_where_shared(points, known, 2 * together, fixed))


def _where_shared(
    points: list[tuple[Tokens, Footprint]], known: PerToken, layers: int, fixed: float
) -> tuple[Linear, Linear, Linear]:
    """What two microbatches say that share more and less of their sequences.

    Args:
        fixed: Bytes of a forward pass whatever the tokens.
    """
    found = [(pack, ((f.kept - pack.sum * known.edge) / layers, f.forward - fixed,
                     f.backward - known.gradients)) for pack, f in points]
    kept, forward, backward = (
        Linear.through([(pack.sum, pack.again, values[i]) for pack, values in found])
        for i in range(3))
    return kept, forward, backward


def _halves(lengths: Sequence[int], share: float) -> list[tuple[int, int]]:
    """(prompt, response) tokens of sequences whose prompts are such a share."""
    return [(round(n * share), n - round(n * share)) for n in lengths]


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
