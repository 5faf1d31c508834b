"""The phases of a round, timed one by one with the product's own owners."""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_irl.bench.generation import time_generation
from megatron_irl.bench.timing import median_seconds
from megatron_irl.bench.work import Case, PhaseMemory, random_pairs
from megatron_irl.collector import settled
from megatron_irl.compat.narrow_optimizer import reload_main_params
from megatron_irl.hardware.stopwatch import Stopwatch
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.run.inputs import Headers
from megatron_irl.run.opening import build_policy, build_trainer, open_generator
from megatron_irl.run.speed import Speedometer
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.batches import microbatches_for, work_of

PHASES = ("generate", "reference", "train", "save")
BETA = 0.1


class Bench:
    """A policy and its trainer on this rank, with random weights or the recipe's.

    Collectives: every method, every rank.
    """

    def __init__(
        self, case: Case, headers: Headers, topology: Topology, *, random_weights: bool
    ) -> None:
        self.case, self.topology, self.arch = case, topology, headers.architecture
        self.memory = PhaseMemory()
        headers = replace(headers, recipe=case.recipe)  # resolved
        self.policy = build_policy(headers, topology, weights=not random_weights)
        if random_weights:
            fill_randomly(self.policy.chunks)
        self.trainer = build_trainer(headers, self.policy)
        if hasattr(self.trainer.optimizer, "reload_model_params"):
            reload_main_params(self.trainer.optimizer)
        self.speed = Speedometer(self.arch, topology, self.policy.chunks)
        open_generator(self.policy, case.recipe)

    def run(self, phase: str) -> dict[str, Any]:
        """Medians of a phase: seconds, speeds, and the most memory it took (GiB)."""
        self.memory.begin()
        with settled():  # as in a run
            found = getattr(self, f"_{phase}")()
        return {"phase": phase} | found | self.memory.peaks()

    def _train(self) -> dict[str, Any]:
        case, rates = self.case, []
        size = case.recipe.train.global_batch_size
        for step in range(case.warmup + case.steps):
            pairs = random_pairs(self.arch.vocab_size, size, case.prompt, case.response, seed=step)
            with Stopwatch() as timer:
                packs = microbatches_for(
                    pairs, self.topology, multiple_of=self.policy.multiple_of,
                    micro_batch_size=case.recipe.train.micro_batch_size,
                    micro_batch_tokens=case.recipe.train.micro_batch_tokens,
                    share_prompts=case.recipe.train.share_prompts,
                )
                self.trainer.stepper.train_step(packs, pair_objective)
            if step >= case.warmup:
                work = work_of(packs)
                speed = self.speed.step(work, timer.seconds, has_head=True)
                rates.append((timer.seconds, work.whole * self.topology.dp_size, speed))
        seconds = statistics.median(rate[0] for rate in rates)
        tokens = statistics.median(rate[1] / rate[0] for rate in rates)
        found = {"seconds": seconds, "tokens_per_second": tokens}
        for name in ("train/tflops", "train/tflops_padded", "train/mfu"):
            if name in rates[0][2]:
                found[name] = statistics.median(rate[2][name] for rate in rates)
        return found

    def _generate(self) -> dict[str, Any]:
        return time_generation(self.policy, self.case, self.speed)

    def _reference(self) -> dict[str, Any]:
        case = self.case
        pairs = random_pairs(self.arch.vocab_size, case.requests, case.prompt, case.response,
                             seed=0)
        sequences = [(p.prompt_ids, ids) for p in pairs for ids in (p.demo_ids, p.sample_ids)]
        seconds = median_seconds(lambda _: self.policy.score(sequences), case)
        tokens = sum(len(a) + len(b) for a, b in sequences)
        return {"seconds": seconds, "tokens_per_second": tokens / seconds}

    def _save(self) -> dict[str, Any]:
        folder = Path(self.case.recipe.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # One place for all ranks, which write their parts into one checkpoint.
        place = Path(on_main(lambda: tempfile.mkdtemp(dir=folder), self.topology))
        try:
            saver = Checkpointer(place, self.topology, keep=1)
            with Stopwatch() as timer:
                saver.save(1, self.policy.chunks, self.trainer.optimizer, self.trainer.scheduler,
                           {})
            size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
            self.topology.barrier()
        finally:
            if self.topology.is_main:
                shutil.rmtree(place, ignore_errors=True)
        return {"seconds": timer.seconds, "bytes": size, "bytes_per_second": size / timer.seconds}


def fill_randomly(chunks: Any) -> None:
    """Weights of small random numbers; norms are one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.fill_(1.0)
                elif parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.zero_()


def pair_objective(logprobs_R: torch.Tensor, batch: Any) -> Any:
    """The sigmoid loss of irft."""
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, beta=BETA)


def phases_of(asked: str) -> Iterator[str]:
    """The phases that ``--phase`` names; a round is all but saving."""
    names = {"all": PHASES, "round": PHASES[:3]}.get(asked, (asked,))
    yield from names
