"""What the ranks of a test of adapters run; importable by name."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl.adapters.adapters import Adapters, add_adapters
from megatron_irl.adapters.export import export_adapter
from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.config import AdapterConfig, ParallelConfig
from megatron_irl.convert.export import export_hf
from megatron_irl.convert.hf_config import read_hf_config
from megatron_irl.generation import SamplingConfig
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.policy.policy import Policy
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer
from megatron_irl.train.step import Stepper
from megatron_irl.types import Pair
from tests.dist.jobs import (
    Layout,
    _Schedule,
    build,
    multiple_of,
    objective,
    random_sequences,
)

from megatron.core.optimizer import OptimizerConfig  # isort: skip


VOCAB = 127  # odd, so that it is padded under TP


def build_stepper(
    hf: str, layout: Layout, adapter: dict[str, Any], optimizer: dict[str, Any], **ddp: Any
) -> tuple[Stepper, Adapters]:
    """A stepper over a policy of adapters."""
    topology, chunks, _, arch = build(hf, layout)
    spec = adapter_spec(AdapterConfig(**adapter), arch, ParallelConfig(**layout), seed=3)
    assert spec is not None
    adapters = add_adapters(chunks, spec, arch, topology)
    sharded = optimizer.get("optimizer", "adam") == "adam"
    policy = Policy(chunks, topology, arch, rows_at_once=32, adapters=adapters).for_training(
        build_ddp_config({"use_distributed_optimizer": sharded} | ddp)
    )
    options = OptimizerConfig(
        params_dtype=torch.float32, weight_decay=0.0, use_distributed_optimizer=sharded, **optimizer
    )
    return Stepper(policy, build_megatron_optimizer(options, policy.chunks, topology)), adapters


def base_of(stepper: Stepper) -> list[torch.Tensor]:
    """A copy of every frozen weight."""
    return [p.detach().clone() for chunk in stepper.policy.chunks for p in chunk.parameters()
            if not p.requires_grad]


def train(
    hf: str, layout: Layout, adapter: dict[str, Any], pairs: list[Pair], steps: int, out: str,
    optimizer: dict[str, Any],
) -> tuple[list[float], list[list[float]]]:
    """Steps on all pairs; writes ``gradients`` of the first and the ``trained`` adapter.

    Returns:
        The losses, and log-probabilities of ``random_sequences`` at the end.
    """
    stepper, adapters = build_stepper(hf, layout, adapter, optimizer)
    policy, base = stepper.policy, base_of(stepper)
    buffers = sum(
        buffer.numel for chunk in policy.chunks for buffer in chunk.buffers
    )
    assert adapters.num_parameters <= buffers < adapters.num_parameters + 4096  # padding
    batches = microbatches_for(
        pairs, policy.topology, micro_batch_size=2, multiple_of=multiple_of(layout)
    )
    losses = []
    for step in range(steps):
        losses.append(stepper.train_step(batches, objective).loss)
        if step == 0:
            with adapters.set_aside(), torch.no_grad():
                for parameter in adapters.parameters:
                    parameter.copy_(parameter.main_grad)
                export_adapter(adapters, Path(out) / "gradients", base=Path(hf), digest="none")
    export_adapter(adapters, Path(out) / "trained", base=Path(hf), digest="none")
    assert all(map(torch.equal, base, base_of(stepper))), "the base has changed"
    scores = policy.score(random_sequences(11, 12, VOCAB))
    with policy.merged():
        merged = policy.score(random_sequences(11, 12, VOCAB))
    assert all(map(torch.equal, base, base_of(stepper))), "merging was not undone exactly"
    for one, other in zip(scores, merged, strict=True):
        assert abs(one - other).max() < 1e-4
    return losses, [score.tolist() for score in scores]


def sample_and_export(
    hf: str, layout: Layout, adapter: dict[str, Any], prompts: list[np.ndarray],
    sampling: dict[str, Any], out: str,
) -> list[list[list[int]]]:
    """Greedy token ids with the updates merged, then applied; writes ``hf`` with them merged."""
    stepper, adapters = build_stepper(hf, layout, adapter, {"lr": 1e-2})
    policy, base, answers = stepper.policy, base_of(stepper), []
    for merged in (True, False):
        policy.samples_merged = merged
        policy.open_generator(max_sequence_length=64, max_requests=4)
        samples = policy.generate(prompts, SamplingConfig(**sampling))
        policy.generator.close()
        answers.append([sample.token_ids.tolist() for sample in samples])
        assert all(map(torch.equal, base, base_of(stepper))), "the base has changed"
    with adapters.merged():
        export_hf(policy.chunks, policy.architecture, read_hf_config(Path(hf)), Path(out) / "hf",
                  source_dir=Path(hf), topology=policy.topology)
    return answers


def save(
    hf: str, layout: Layout, adapter: dict[str, Any], pairs: list[Pair], steps: int, out: str,
) -> list[float]:
    """Adam steps, a checkpoint in the middle; the losses."""
    stepper, _ = build_stepper(hf, layout, adapter, {"lr": 1e-2})
    batches = microbatches_for(
        pairs, stepper.policy.topology, micro_batch_size=2, multiple_of=multiple_of(layout)
    )
    losses = []
    for step in range(steps):
        if step == steps // 2:
            Checkpointer(Path(out), stepper.policy.topology, keep=1).save(
                step, stepper.policy.chunks, stepper.optimizer, _Schedule(), {"step": step}
            )
        losses.append(stepper.train_step(batches, objective).loss)
    return losses


def resume(
    hf: str, layout: Layout, adapter: dict[str, Any], pairs: list[Pair], steps: int, at: int,
    out: str,
) -> list[float]:
    """The losses after a checkpoint, from adapters that were zeroed before it was read."""
    stepper, adapters = build_stepper(hf, layout, adapter, {"lr": 1e-2})
    with torch.no_grad():
        for parameter in adapters.parameters:
            parameter.zero_()
    checkpointer = Checkpointer(Path(out), stepper.policy.topology, keep=1)
    checkpointer.load(at, stepper.policy.chunks, stepper.optimizer, _Schedule())
    batches = microbatches_for(
        pairs, stepper.policy.topology, micro_batch_size=2, multiple_of=multiple_of(layout)
    )
    return [stepper.train_step(batches, objective).loss for _ in range(steps - at)]
