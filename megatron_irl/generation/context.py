"""Megatron's paged KV cache and scheduler, without the paddings and recomputation of CPU decode.

Everything here is by subclassing; nothing upstream is patched.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_irl import hardware

from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext  # isort: skip


class PagedContext(DynamicInferenceContext):
    """The dynamic inference context, as the engine adapter needs it."""

    if not hardware.IS_CUDA:
        # Padding a step to 64 tokens suits GPU kernels and graphs; on CPU it is 64 rows of real
        # work however few requests are left. Multiples of the tensor-parallel size remain.
        TOKEN_ROUNDER = 1
        REQUEST_ROUNDER = 1

    _angles: dict[int, tuple[Tensor, Tensor]] | None = None
    _slots: Tensor | None = None

    def map_layers(self, stage_layers: list[Any]) -> None:
        """Number this rank's transformer layers in the order of their cache slices.

        Upstream derives the number from a contiguous split over pipeline stages. Interleaved
        stages hold several separate runs of layers, so it is taken from the layers instead.
        """
        self.layer_map = {
            layer.layer_number - layer.self_attention._get_pp_layer_offset_for_inference() - 1: i
            for i, layer in enumerate(stage_layers)
        }

    def release(self) -> None:
        """Free the cache now, whatever reference cycles the engine leaves behind."""
        for name in [n for n, value in vars(self).items() if isinstance(value, Tensor)]:
            delattr(self, name)
        self._angles = self._slots = None
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
        self._angles = None
        if not hardware.IS_CUDA:
            tokens = slice(self.padded_active_token_count)
            self._slots = (
                self.gpu_view.token_to_block_idx[tokens].long() * self.block_size_tokens
                + self.gpu_view.token_to_local_position_within_kv_block[tokens]
            )
        return event

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Write the step's keys and values, [T, 1, K, D] each, into the cache."""
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
        if not _plain_rotary(config):
            return super().apply_rotary_emb_query(
                query, query_emb, config, cu_seqlens_q, cp_group, mscale
            )
        return self._rotate(query, query_emb, mscale)

    def apply_rotary_emb_key(
        self, key: Tensor, key_emb: Tensor, config: Any, cp_group: Any, mscale: float = 1.0
    ) -> Tensor:
        """Rotate keys [T, 1, K, D] by their positions."""
        if not _plain_rotary(config):
            return super().apply_rotary_emb_key(key, key_emb, config, cp_group, mscale)
        return self._rotate(key, key_emb, mscale)

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
