"""Models of one rank on a GPU, as the tests of this folder build them."""

from pathlib import Path

import numpy as np
import torch

from tests.dist.jobs import random_sequences
from tests.gpu.conftest import VOCAB


def build(hf: Path, topology, *, precision="fp32", spec=None, **overrides):
    from megatron_irl.config import ParallelConfig
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.load import load_hf_weights
    from megatron_irl.model.build import build_chunks, build_config

    arch = architecture(read_hf_config(hf))
    config = build_config(
        arch, ParallelConfig(), precision=precision, overrides=overrides, spec=spec
    )
    chunks = build_chunks(config, arch, topology, spec=spec)
    load_hf_weights(chunks, arch, hf, tp_rank=0, tp_size=1)
    return chunks, config


def policy_of(hf, chunks, topology):
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.policy.policy import Policy

    return Policy(chunks, topology, architecture(read_hf_config(hf)))


def logprobs(hf, chunks, topology) -> np.ndarray:
    return np.concatenate(policy_of(hf, chunks, topology).score(random_sequences(7, 24, VOCAB)))


class FakeScheduler:
    """What a checkpoint asks of a schedule."""

    num_steps = 0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def tensors_of(tree):
    """Tensors of a nested sharded state, at any depth."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        data = getattr(tree, "data", tree)
        return [data] if isinstance(data, torch.Tensor) else []
    return [tensor for part in tree for tensor in tensors_of(part)]
