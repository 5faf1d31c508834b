"""What tensors are alive; jobs of tests about memory, importable by name."""

import gc
from collections.abc import Sequence

import numpy as np
import torch

from megatron_irl import collector
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from tests.dist.jobs import Layout, build


def live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python can reach."""
    assert collector._is_kept, "else a run would set aside what it is built of"
    for _ in range(2):  # a model under DDP is only let go of when the hooks of its gradients are
        gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [thing for thing in gc.get_objects() if type(thing) in kinds and not thing.is_meta]


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages under them, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def memory_of_generation(
    hf: str, layout: Layout, prompts: list[np.ndarray]
) -> tuple[int, int, int, int]:
    """Live tensor bytes before, during and after generation; and the size of the KV cache."""
    topology, chunks, _, _ = build(hf, layout)
    options = SamplingConfig(max_new_tokens=4, eos_id=1)
    generator = MegatronGenerator(
        chunks, topology, max_sequence_length=256, vocab_size=128, max_requests=16
    )
    generator.generate(prompts[:1], options)  # what a process keeps for good: index tables, ...
    generator.close()
    before = storage_bytes(live_tensors())
    generator.generate(prompts, options)
    during, cache = storage_bytes(live_tensors()), generator.engine.context.memory_buffer.nbytes
    generator.close()
    return before, during, storage_bytes(live_tensors()), cache
