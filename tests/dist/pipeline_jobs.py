"""What the ranks of ``test_pipeline_sampling.py`` run; importable by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.console import Console
from megatron_irl.errors import UserError
from megatron_irl.generation import SamplingConfig
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.policy.pairs import sample_pairs
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.whole_model import WholeModel
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.types import Demonstration
from tests.dist.jobs import Layout, build
from tests.dist.memory import live_tensors, storage_bytes

Drawn = list[tuple[list[int], list[float], str]]


def open_policy(
    hf: str, layout: Layout, ddp: dict[str, Any] | None = None, **options: Any
) -> Policy:
    """On the folder's weights, ready to generate."""
    topology, chunks, _, arch = build(hf, layout)
    policy = Policy(chunks, topology, arch)
    if ddp is not None:
        policy = policy.for_training(build_ddp_config(ddp))
    policy.open_generator(max_sequence_length=64, max_requests=4, **options)
    return policy


def over_rounds(
    hf: str, layout: Layout, prompts: Sequence[np.ndarray], sampling: dict[str, Any], *,
    pipeline: str = "auto", ddp: dict[str, Any] | None = None, rounds: int = 3,
) -> dict[str, Any]:
    """Samples of several rounds, between which the weights change in place, and what was held."""
    policy = open_policy(hf, layout, ddp, pipeline=pipeline)
    drawn: list[Drawn] = []
    replicas, held = [], []
    random = torch.get_rng_state()
    for _ in range(rounds):
        before = storage_bytes(live_tensors())
        ranks = policy.sampling_ranks()
        replicas.append((ranks.dp_rank, ranks.dp_size, ranks.pp_size))
        samples = policy.generate(prompts, SamplingConfig(**sampling))
        drawn.append([(s.token_ids.tolist(), s.logprobs.tolist(), s.finish_reason)
                      for s in samples])
        during = storage_bytes(live_tensors())
        policy.release_cache()
        held.append((before, during, storage_bytes(live_tensors())))
        with torch.no_grad():
            for chunk in policy.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(0.8)
    assert policy.generator is not None
    whole = policy.generator._whole
    return {
        "drawn": drawn, "replicas": replicas, "held": held, "note": policy.generator.take_note(),
        "copy": whole.nbytes if isinstance(whole, WholeModel) else 0,
        "random": torch.equal(random, torch.get_rng_state()),
    }


def under_scarcity(
    hf: str, layout: Layout, prompts: Sequence[np.ndarray], sampling: dict[str, Any]
) -> dict[str, Any]:
    """What is chosen, and sampled, where ranks have little memory or cannot allocate it."""
    measured, allocate = hardware.free_memory, WholeModel.allocate
    found: dict[str, Any] = {}

    def note() -> str | None:
        assert policy.generator is not None
        return policy.generator.take_note()

    def draw(policy: Policy) -> list[list[int]]:
        return [s.token_ids.tolist() for s in policy.generate(prompts, SamplingConfig(**sampling))]

    def fail(self: WholeModel) -> list[Any]:
        raise RuntimeError("not enough memory: you tried to allocate it")

    policy = open_policy(hf, layout)
    last = policy.topology.rank == policy.topology.world_size - 1
    try:
        hardware.free_memory = lambda: 0 if last else measured()  # on one rank alone
        found["scarce"] = draw(policy), note(), policy.sampling_ranks().dp_size
        found["said once"] = note()
        policy.release_cache()
        hardware.free_memory = measured  # as another phase may find it
        found["free again"] = draw(policy), note()
        policy.release_cache()
        if last:
            WholeModel.allocate = fail
        found["fails"] = draw(policy), note()
        found["fails after a failure"] = draw(policy)
        forced = open_policy(hf, layout, pipeline="replicas")
        try:
            draw(forced)
        except UserError as error:
            found["forced"] = str(error)
        WholeModel.allocate = allocate
        hardware.free_memory = lambda: 0  # what was asked for is not measured
        found["forced works"] = draw(forced)
    finally:
        hardware.free_memory, WholeModel.allocate = measured, allocate
    return found


def fill_bank(
    hf: str, layout: Layout, prompts: Sequence[np.ndarray], sampling: dict[str, Any], folder: str,
    ddp: dict[str, Any] | None = None, pipeline: str = "auto",
) -> tuple[dict[str, Any], list[int]]:
    """A round of the bank as training fills it; its summary, and the parts this rank wrote."""
    policy = open_policy(hf, layout, ddp, pipeline=pipeline)
    bank = SharedBank(Path(folder), 3, policy.topology)
    bank.open(0, inside=False, required=True)
    wrote: list[int] = []
    write = bank.write_part

    def write_part(round_index: int, number: int, pairs: Any) -> None:
        wrote.append(number)
        write(round_index, number, pairs)

    bank.write_part = write_part  # type: ignore[method-assign]
    demonstrations = [
        Demonstration(i, ids, ids[:1], "", "", None, "") for i, ids in enumerate(prompts)
    ]
    summary = sample_pairs(
        policy, bank, 0, demonstrations, sampling=SamplingConfig(**sampling), part_size=2,
        console=Console(enabled=False), clock=Clock({}, policy.topology.heart),
    )
    return summary, wrote
