"""Generation over two pipeline stages: in turn, as replicas, and by groups of requests in turn.

    python tools/benchmark_pipeline.py [--requests 64] [--new 64] [--model benchmarks/llama-20m]

Random weights, fp32 on CPU, a thread a rank; the ways take turns. Beside seconds
of the clock it takes each rank's own processor time, which other work on the machine disturbs far
less, and what that bounds the speed to:

- stages in turn: one works while the other waits, so a call takes the sum over the ranks;
- replicas: the larger of the two;
- groups: one stage has one group of requests while the other has the other. Not built; two calls
  with half the requests each, and the larger of what they take on a stage, are what it could reach.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_irl.bench.phases import fill_randomly
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.generation import SamplingConfig
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown
from megatron_irl.policy.policy import Policy

STAGES = 2
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def main() -> None:
    options = parse_arguments()
    if "RANK" in os.environ:
        measure(options)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:]],
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(STAGES),
                    "LOCAL_WORLD_SIZE": str(STAGES), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "MEGATRON_IRL_PLATFORM": "cpu",
                },
            ) for rank in range(STAGES)
        ]
        if any([rank.wait() for rank in ranks]):
            sys.exit(1)


def measure(options: argparse.Namespace) -> None:
    """On one rank; rank 0 prints."""
    torch.set_num_threads(1)
    parallel = ParallelConfig(pipeline_model_parallel_size=STAGES)
    topology = initialize(parallel)
    arch = architecture(read_hf_config(options.model))
    chunks = build_chunks(build_config(arch, parallel), arch, topology)
    fill_randomly(chunks)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, arch.vocab_size, options.prompt).astype(np.int32)
               for _ in range(options.requests)]
    sampling = SamplingConfig(seed=1, eos_id=arch.vocab_size, max_new_tokens=options.new)
    policies = {}
    for pipeline in ("stages", "replicas"):
        policies[pipeline] = Policy(chunks, topology, arch)
        policies[pipeline].open_generator(
            max_sequence_length=options.prompt + options.new, max_requests=options.requests,
            pipeline=pipeline,
        )
    half = options.requests // 2
    ways = {
        "stages": lambda: policies["stages"].generate(prompts, sampling),
        "replicas": lambda: policies["replicas"].generate(prompts, sampling),
        "groups": lambda: [policies["stages"].generate(part, sampling)
                           for part in (prompts[:half], prompts[half:])],
    }
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            topology.barrier()
            clock, own = time.perf_counter(), time.process_time()
            way()
            own = time.process_time() - own
            topology.barrier()
            all_own: list[Any] = [None] * STAGES
            dist.all_gather_object(all_own, own)
            if repeat:  # the first one builds the engine
                found[name].append((time.perf_counter() - clock, all_own))
    if topology.is_main:
        print(json.dumps(report(found, options.requests * options.new)))
    shutdown()


def report(found: dict[str, list[tuple[float, list[float]]]], tokens: int) -> dict[str, Any]:
    """Medians by way, in tokens a second: by the clock, and what processor time bounds it to."""
    bound = {"stages": sum, "replicas": max, "groups": max}
    return {
        name: {
            "clock": round(tokens / statistics.median(clock for clock, _ in runs), 1),
            "bound": round(tokens / statistics.median(bound[name](own) for _, own in runs), 1),
            "seconds_of_ranks": [[round(s, 2) for s in own] for _, own in runs],
        } for name, runs in found.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("requests", 64), ("prompt", 64), ("new", 64),
                          ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, default=BENCHMARKS / "llama-20m",
                        help="HF folder, of which config.json is read")
    return parser.parse_args()


if __name__ == "__main__":
    main()
