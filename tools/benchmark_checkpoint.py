"""How long a checkpoint stops training, how long it takes in all, and what host memory it needs.

    python tools/benchmark_checkpoint.py --model benchmarks/llama-2.8b [--saves 5]    (one GPU)
    python tools/benchmark_checkpoint.py --model benchmarks/llama-200m --ranks 2      (CPU, DP2)

A model with random weights takes optimizer steps, is saved in the background and in the foreground
through the run's own checkpointer, and is read back into zeros. ``--upstream`` adds Megatron's own
formats, saved in the foreground: ``fully_reshardable`` as release 0.1.0 did (gathered on one rank,
one file) and ``dp_reshardable`` (each rank its shard; for one model-parallel layout only).
Only one checkpoint is on the disk at a time. Background and foreground take turns. The last line
is JSON, of rank 0, with the medians.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from megatron_irl import hardware
from megatron_irl.bench.phases import Bench, pair_objective
from megatron_irl.bench.work import Case, Range, random_pairs
from megatron_irl.config import ParallelConfig, load_recipe, resolve
from megatron_irl.hardware.host_copy import copy_to_host, threads_for_files
from megatron_irl.parallel.topology import Topology, initialize, shutdown
from megatron_irl.run.inputs import read_headers
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.batches import microbatches_for

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # isort: skip
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    TorchDistSaveShardedStrategy,
)
from megatron.core.utils import unwrap_model  # isort: skip

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LENGTHS = Range(256, 512) if hardware.IS_CUDA else Range(16, 32)  # of prompts and responses
SCHEDULE = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)


class Saves:
    """A model that is being trained, and its checkpoints in ``folder``."""

    def __init__(self, options: argparse.Namespace, topology: Topology, folder: Path) -> None:
        self.topology, self.folder = topology, folder
        recipe = load_recipe(BENCHMARKS / "pairs.yaml", [
            f"model.hf={options.model}", f"precision={'bf16' if hardware.IS_CUDA else 'fp32'}",
            f"train.micro_batch_size={options.pairs}",
            f"train.global_batch_size={options.pairs * topology.dp_size}",
        ], check_files=False)
        case = Case(resolve(recipe, 1_000_000), LENGTHS, LENGTHS, requests=1, steps=1, warmup=0)
        built = Bench(case, read_headers(recipe), topology, random_weights=True)
        self.stepper = built.trainer.stepper
        pairs = random_pairs(
            built.arch.vocab_size, recipe.train.global_batch_size, LENGTHS, LENGTHS, seed=0
        )
        self.batch = microbatches_for(
            pairs, topology, micro_batch_size=options.pairs,
            multiple_of=built.policy.multiple_of,
        )
        self.steps = 0

    def step(self) -> float:
        """Seconds of an optimizer step."""
        start = time.perf_counter()
        self.stepper.train_step(self.batch, pair_objective)
        hardware.synchronize()
        self.steps += 1
        return time.perf_counter() - start

    def save(self, *, asynchronous: bool) -> dict[str, float]:
        """One save, training on while it is written; and reading it back."""
        checkpointer = Checkpointer(
            self.folder, self.topology, keep=1, asynchronous=asynchronous
        )
        alone = statistics.median(self.step() for _ in range(3))
        before, sizes = self.digest(), self.shard_bytes()
        with peak_of_memory() as peak:
            start, during = time.perf_counter(), []
            policy = self.stepper.policy
            checkpointer.save(self.steps, policy.chunks, self.stepper.optimizer, SCHEDULE, {})
            stall = time.perf_counter() - start
            while checkpointer._pending is not None:
                during.append(self.step())
                checkpointer.settle_if_ended()
            total = time.perf_counter() - start
        measured = checkpointer.take_measured()
        loaded = self.load(checkpointer, before)
        found = {
            "stall_seconds": stall, "total_seconds": total, **loaded,
            "step_seconds": alone, "steps_during": len(during),
            "peak_host_gib": peak[0] / 2**30, "shard_gib": sizes / 2**30,
            "files": len(list(checkpointer.path(checkpointer.steps()[-1]).glob("*.distcp"))),
            "gib": measured.get("checkpoint/bytes", 0) / 2**30,
        }
        if during:
            found["step_seconds_during"] = statistics.median(during)
        self.forget()
        return found

    def load(self, checkpointer: Checkpointer, before: float) -> dict[str, float]:
        """Check and read what was saved; it must be what was there."""
        for tensor in self.tensors():
            tensor.zero_()
        start = time.perf_counter()
        step = checkpointer.latest()
        verified = time.perf_counter() - start
        assert step is not None
        start = time.perf_counter()
        checkpointer.load(step, self.stepper.policy.chunks, self.stepper.optimizer, SCHEDULE)
        hardware.synchronize()
        seconds = time.perf_counter() - start
        assert self.digest() == before, "what was read is not what was saved"
        return {"verify_seconds": verified, "load_seconds": seconds}

    def upstream(self, kind: str) -> dict[str, float]:
        """Megatron's own save in the foreground, of one of its formats."""
        with peak_of_memory() as peak:
            start = time.perf_counter()
            if self.topology.is_main:
                self.folder.joinpath("upstream").mkdir(parents=True)
            self.topology.barrier()
            metadata = {
                "distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True,
                "distrib_optim_fully_reshardable_mem_efficient": False,  # no gloo groups
                "singleton_local_shards": False, "dp_cp_group": self.topology.dp_group,
            }
            model = {
                f"model{i}": chunk.sharded_state_dict(metadata=metadata)
                for i, chunk in enumerate(unwrap_model(self.stepper.policy.chunks))
            }
            state = self.stepper.optimizer.sharded_state_dict(model, False, metadata=metadata)
            strategy: Any = None
            if kind == "dp_reshardable":
                strategy = FullyParallelSaveStrategyWrapper(
                    TorchDistSaveShardedStrategy(thread_count=threads_for_files()),
                    self.topology.dp_group,
                )
            dist_checkpointing.save(
                model | {"optimizer": state}, str(self.folder / "upstream"), strategy
            )
            seconds = time.perf_counter() - start
        self.forget()
        return {"stall_seconds": seconds, "total_seconds": seconds,
                "peak_host_gib": peak[0] / 2**30}

    def copies(self) -> dict[str, float]:
        """GB/s of the copy to host memory, twice each with and without huge pages."""
        tensors = list(self.tensors())
        found = {}
        for name, huge in (("plain", False), ("huge", True), ("plain_again", False),
                           ("huge_again", True)):
            start = time.perf_counter()
            copies = copy_to_host(tensors, huge_pages=huge)
            seconds = time.perf_counter() - start
            found[name] = sum(copy.nbytes for copy in copies) / seconds / 1e9
            del copies
        return found

    def forget(self) -> None:
        """Remove the checkpoint: the disk may have room for one only."""
        self.topology.barrier()
        if self.topology.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.topology.barrier()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Weights, and what this rank updates: main weights and moments."""
        for chunk in self.stepper.policy.chunks:
            yield from (parameter.data for parameter in chunk.parameters())
        for part in self.stepper.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter.data
                    state = part.optimizer.state[parameter]
                    yield from (v for k, v in state.items() if k.startswith("exp_avg"))

    def digest(self) -> float:
        """A number that says whether all tensors are what they were."""
        return sum(float(tensor.double().abs().sum()) if tensor.numel() < 1 << 24 else
                   sum(float(p.double().abs().sum()) for p in tensor.view(-1).split(1 << 24))
                   for tensor in self.tensors())

    def shard_bytes(self) -> int:
        """What this rank has to save if replicas share the weights evenly."""
        own = 0
        for part in self.stepper.optimizer.chained_optimizers:
            own += 12 * sum(p.numel() for g in part.optimizer.param_groups for p in g["params"])
        weights = sum(p.nbytes for c in self.stepper.policy.chunks for p in c.parameters())
        return own + weights // self.topology.dp_size


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Bytes that this process and its children took more than before, at most."""
    me, done, peak = psutil.Process(), threading.Event(), [0]

    def used() -> int:
        total = me.memory_info().rss
        for child in me.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:
                continue
        return total

    before = used()

    def watch() -> None:
        while not done.wait(0.03):
            peak[0] = max(peak[0], used() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, on this rank."""
    topology = initialize(ParallelConfig())
    bench = Saves(options, topology, folder / "checkpoints")
    bench.step()
    found: dict[str, Any] = {"model": options.model.name, "ranks": topology.world_size,
                             "threads": threads_for_files()}
    plan: list[tuple[str, Callable[[], dict[str, float]]]] = []
    for i in range(options.saves):
        plan.append((f"asynchronous_{i + 1}", lambda: bench.save(asynchronous=True)))
        if not options.only_asynchronous:
            plan.append((f"synchronous_{i + 1}", lambda: bench.save(asynchronous=False)))
    if options.upstream:
        for kind in ("dp_reshardable", "fully_reshardable"):
            plan.append((f"upstream_{kind}", lambda kind=kind: bench.upstream(kind)))
    if options.copies:
        plan.insert(0, ("copy_gb_per_second", bench.copies))
    for name, work in plan:
        found[name] = {key: round(value, 3) for key, value in work().items()}
        if topology.is_main:
            print(name, json.dumps(found[name]), flush=True)
    for kind in ("asynchronous", "synchronous"):
        mine = [found[name] for name in found if name.startswith(f"{kind}_")]
        if mine:
            found[f"median_{kind}"] = {key: statistics.median(each[key] for each in mine)
                                       for key in mine[0] if all(key in each for each in mine)}
    shutdown()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=BENCHMARKS / "llama-200m",
                        help="HF folder, of which config.json is read")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks on this machine")
    parser.add_argument("--saves", type=int, default=2, help="saves of each kind")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a step")
    parser.add_argument("--only-asynchronous", action="store_true")
    parser.add_argument("--upstream", action="store_true", help="Megatron's own formats too")
    parser.add_argument("--copies", action="store_true", help="the copy to host memory by itself")
    parser.add_argument("--out", type=Path, help="where checkpoints go (default: a temporary one)")
    options = parser.parse_args(argv)
    if "RANK" in os.environ or options.ranks == 1:
        with tempfile.TemporaryDirectory(dir=options.out) as scratch:
            found = measure(options, Path(os.environ.get("BENCHMARK_FOLDER", scratch)))
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory(dir=options.out) as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:])],
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "BENCHMARK_FOLDER": scratch,
                    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.ranks)),
                },
            ) for rank in range(options.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
