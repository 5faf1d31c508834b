"""Megatron's paged KV cache and scheduler, without the paddings and recomputation of CPU decode.

Everything here is by subclassing; nothing upstream is patched.
"""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl import hardware

from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext  # isort: skip
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb  # isort: skip


class PagedContext(DynamicInferenceContext):
    """The dynamic inference context, as the engine adapter needs it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._arrays: dict[str, tuple[Tensor, np.ndarray]] = {}
        super().__init__(*args, **options)

    if not hardware.IS_CUDA:
        # Padding a step to 64 tokens suits GPU kernels and graphs; on CPU it is 64 rows of real
        # work however few requests are left. Multiples of the tensor-parallel size remain.
        TOKEN_ROUNDER = 1
        REQUEST_ROUNDER = 1

    _angles: dict[int, tuple[Tensor, ...]] | None = None
    _slots: Tensor | None = None
    _last_layers: set[int] = set()
    _in_last_layer = False

    def map_layers(self, models: list[Any]) -> None:
        """Number this rank's transformer layers in the order of their cache slices.

        Upstream derives the number from a contiguous split over pipeline stages. Interleaved
        stages hold several separate runs of layers, so it is taken from the layers instead.
        """
        def number(layer: Any) -> int:  # on this rank, as attention tells it
            return layer.layer_number - layer.self_attention._get_pp_layer_offset_for_inference()

        runs = [[number(layer) for layer in model.decoder.layers] for model in models]
        self.layer_map = {n - 1: place for place, n in enumerate(itertools.chain(*runs))}
        self._last_layers = {run[-1] for run in runs if run}

    def add_request(self, req: Any, prefill_chunk_length: int | None = None) -> None:
        """Take up a request with its whole prompt, as upstream does, at a tenth of its cost.

        Upstream writes the same fields one tensor operation at a time, which for a wave of new
        requests keeps the device waiting longer than their prompts take it. Written after
        megatron-core 0.19.2; to be removed when upstream fills its fields at once.
        """
        if self.enable_prefix_caching or prefill_chunk_length is not None:
            super().add_request(req, prefill_chunk_length)
            return
        row, first = int(self.total_request_count), int(self.active_token_count)
        prompt = req.remaining_prompt_tokens.numpy()
        length, block = len(prompt), self.block_size_tokens
        count = -(-length // block)
        blocks = self.kv_block_allocator.allocate_memory_blocks(count)
        if blocks is None or row >= self.max_requests or first + length > self.max_tokens:
            raise RuntimeError(f"request {req.request_id} was taken up without room for it")
        blocks = blocks.numpy()
        places = np.arange(length)
        for name, value in (
            ("request_ids", req.request_id), ("request_query_lengths", length),
            ("request_in_prefill_status_tensor", 1),
            ("request_output_lengths", length + req.sampling_params.num_tokens_to_generate),
            ("request_kv_length_offsets", 0), ("request_kv_block_counts", count),
            ("request_last_kv_block_id", blocks[-1]),
            ("request_last_kv_block_offset", (length - 1) % block),
        ):
            self._array(name)[row] = value
        for (label, _), value in zip(
            self.request_metadata_types, req.tracked_metadata, strict=True
        ):
            self._array(label, self.request_metadata[label])[row] = value
        self._array("request_to_kv_block_ids")[row, :count] = blocks
        for name, values in (
            ("token_to_pos_ids", places), ("token_to_position_in_request", places),
            ("token_to_input_ids", prompt), ("token_to_request_idx", row),
            ("token_to_block_idx", blocks[places // block]),
            ("token_to_local_position_within_kv_block", places % block),
        ):
            self._array(name)[first : first + length] = values
        self.active_token_count += length
        self.lifetime_prefill_token_count += length
        self.total_request_count += 1
        self.num_prefill_requests += 1

    def leave_prompts(self, moves_B: np.ndarray) -> None:
        """Lay out the step after the present one: a token for each request, no prompts.

        Args:
            moves_B: bool [B], requests that go on. The others, for which there may be no cache any
                more, compute what is written to nobody's block: their last one may be shared.
        """
        rows, block = int(self.total_request_count), self.block_size_tokens
        places = np.arange(rows)
        offsets, lengths = (
            self._array(f"request_{name}")[:rows] for name in ("kv_length_offsets", "query_lengths")
        )
        offsets += lengths - ~moves_B
        lengths[:] = 1
        self._array("request_in_prefill_status_tensor")[:rows] = 0
        self.num_prefill_requests, self.active_token_count = 0, rows
        for name, value in (
            ("token_to_pos_ids", offsets), ("token_to_position_in_request", offsets),
            ("token_to_request_idx", places),
            ("token_to_block_idx", np.where(
                moves_B, self._array("request_to_kv_block_ids")[places, offsets // block],
                self.kv_block_allocator.dummy_block_idx,
            )),
            ("token_to_local_position_within_kv_block", np.where(moves_B, offsets % block, 0)),
        ):
            self._array(name)[:rows] = value

    def _array(self, name: str, tensor: Tensor | None = None) -> np.ndarray:
        """A bookkeeping tensor as numpy sees it; looked up once, as making the view costs."""
        found: Tensor = getattr(self, name) if tensor is None else tensor
        known = self._arrays.get(name)
        if known is None or known[0] is not found:
            known = self._arrays[name] = (found, found.numpy())
        return known[1]

    def initialize_attention_state(self, **options: Any) -> Any:
        """Lay out a step; see the base class."""
        event = super().initialize_attention_state(**options)
        # Upstream bounds a captured step's longest query by all its tokens, and attention starts
        # blocks of threads for as much of each request.
        metadata: Any = self.active_attn_metadata
        state = metadata["mha_metadata"].state_data
        state["max_seqlen_q"] = min(state["max_seqlen_q"], self.max_sequence_length)
        return event

    def release(self) -> None:
        """Free the cache now, whatever reference cycles the engine leaves behind."""
        for name in [n for n, value in vars(self).items() if isinstance(value, Tensor)]:
            delattr(self, name)
        self._angles = self._slots = None
        self._arrays = {}
        self.is_tensor_state_allocated = False

    def _allocate_memory_buffer(self) -> None:
        """Allocate the cache with finite contents: SDPA reads masked positions too."""
        if hardware.IS_CUDA:
            super()._allocate_memory_buffer()
            self.memory_buffer.zero_()
            return
        shape = (
            2, self.num_attention_layers, self.kv_block_allocator.total_count,
            self.block_size_tokens, self.num_attention_heads_per_partition,
            self.hidden_size_per_attention_head,
        )
        # numpy's zeros are the operating system's: a page costs memory once it is written to.
        size = int(np.prod(shape)) * self.params_dtype.itemsize
        self.memory_buffer = torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(
            self.params_dtype
        ).view(shape)

    def transfer_bookkeeping_to_gpu(self, *args: Any, **kwargs: Any) -> Any:
        """Publish the step's bookkeeping; what all layers share is derived once from it."""
        event = super().transfer_bookkeeping_to_gpu(*args, **kwargs)
        self.follow_device()
        return event

    def follow_device(self) -> None:
        """Derive anew what all layers share, after the device-side view of the step has changed."""
        self._angles = None
        if not hardware.IS_CUDA:
            tokens = slice(self.padded_active_token_count)
            self._slots = (
                self.gpu_view.token_to_block_idx[tokens].long() * self.block_size_tokens
                + self.gpu_view.token_to_local_position_within_kv_block[tokens]
            )

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Write the step's keys and values, [T, 1, K, D] each, into the cache."""
        self._in_last_layer = layer_number in self._last_layers
        if hardware.IS_CUDA:
            super().append_key_value_cache(layer_number, key, value)
            return
        caches = self.memory_buffer[:, self.layer_map[layer_number - 1]].flatten(1, 2)
        tokens = self.padded_active_token_count
        assert self._slots is not None, "the step's bookkeeping has not been published"
        caches[0].index_copy_(0, self._slots, key[:tokens, 0])
        caches[1].index_copy_(0, self._slots, value[:tokens, 0])

    def apply_rotary_emb_query(
        self, query: Tensor, query_emb: Tensor, config: Any, cu_seqlens_q: Tensor, cp_group: Any,
        mscale: float = 1.0,
    ) -> Tensor:
        """Rotate queries [T, 1, N, D] by their positions."""
        if _plain_rotary(config):
            rotated = self._rotate(query, query_emb, mscale)
        else:
            rotated = self._rotate_fused(query, query_emb, config, cp_group, mscale)
        if self._in_last_layer:
            # A layer rotates its keys, stores them, and rotates its queries, so this was the last
            # use of the angles in the pass through a model chunk. They must not outlive it: a
            # CUDA graph has to compute them itself in each replay, and would otherwise read those
            # of the pass before its capture.
            self._angles = None
        return rotated

    def apply_rotary_emb_key(
        self, key: Tensor, key_emb: Tensor, config: Any, cp_group: Any, mscale: float = 1.0
    ) -> Tensor:
        """Rotate keys [T, 1, K, D] by their positions."""
        if not _plain_rotary(config):
            return self._rotate_fused(key, key_emb, config, cp_group, mscale)
        return self._rotate(key, key_emb, mscale)

    def _rotate_fused(
        self, states: Tensor, angles: Tensor, config: Any, cp_group: Any, mscale: float
    ) -> Tensor:
        # Upstream looks the angles up anew in each layer, for q and for k, and copies q besides.
        known = self._angles = {} if self._angles is None else self._angles
        columns = int(angles.storage_offset())
        if columns not in known:
            positions = self.gpu_view.token_to_pos_ids[: self.padded_active_token_count]
            known[columns] = (angles[positions],)
        return apply_rotary_pos_emb(
            t=states, freqs=known[columns][0], config=config, cp_group=cp_group, mscale=mscale,
            mla_rotary_interleaved=config.multi_latent_attention,
        )

    def _rotate(self, states: Tensor, angles: Tensor, mscale: float) -> Tensor:
        # Upstream looks the angles up and takes their sines anew in each layer, for q and for k.
        # Where layers differ in their frequencies, each kind has its own columns of one table.
        known = self._angles = {} if self._angles is None else self._angles
        columns = int(angles.storage_offset())
        if columns not in known:
            positions = self.gpu_view.token_to_pos_ids[: self.padded_active_token_count]
            half = angles[positions][..., : angles.shape[-1] // 2]
            known[columns] = (
                (half.cos() * mscale).to(states.dtype), (half.sin() * mscale).to(states.dtype)
            )
        cos, sin = known[columns]
        rotated, width = 2 * cos.shape[-1], states.shape[-1]
        first, second = states[..., :rotated].chunk(2, dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        if rotated < width:
            parts.append(states[..., rotated:])
        return torch.cat(parts, dim=-1)


def _plain_rotary(config: Any) -> bool:
    return not (
        config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention
    )
