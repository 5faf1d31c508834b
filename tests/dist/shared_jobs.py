"""What the ranks of ``test_shared.py`` run; importable by name."""

import contextlib
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.config import ParallelConfig
from megatron_irl.convert import load
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.errors import UserError, is_told_elsewhere
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.reduce import largest_over_world
from megatron_irl.parallel.topology import Topology, initialize
from megatron_irl.storage import shared_folder
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.storage.lease import LeaseLost
from megatron_irl.storage.shared_bank import SharedBank
from tests.dist.jobs import build_trainer
from tests.unit.data.pairs import make_pairs


def told(work: Any) -> tuple[str, str, bool] | Any:
    """What ``work`` returns, or its error by kind, text and whether another rank prints it."""
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error), is_told_elsewhere(error)


def outcomes() -> dict[str, Any]:
    """Results and errors of rank 0, and of any rank, as each rank hears of them."""
    topology = initialize(ParallelConfig())

    def fail(kind: type[Exception], rank: int | None = None) -> Any:
        if rank is None or topology.rank == rank:
            raise kind(f"from rank {topology.rank}")
        return topology.rank

    return {
        "result": told(lambda: on_main(lambda: f"of rank {topology.rank}", topology)),
        "user's": told(lambda: on_main(lambda: fail(UserError), topology)),
        "other": told(lambda: on_main(lambda: fail(KeyError), topology)),
        "everywhere": told(lambda: everywhere(lambda: fail(UserError, 9), topology)),
        "on one": told(lambda: everywhere(lambda: fail(UserError, 1), topology)),
        "largest": largest_over_world(
            {"both": float(topology.rank), f"of {topology.rank}": 7.0}, topology),
        "other on one": told(lambda: everywhere(lambda: fail(ZeroDivisionError, 1), topology)),
    }


def load_of_one(folders: list[str]) -> Any:
    """Each rank loads step 1 of a folder of its own."""
    topology = initialize(ParallelConfig())
    checkpointer = Checkpointer(Path(folders[topology.rank]), topology, keep=1)
    return told(lambda: checkpointer.load(1, []))


def probe(folders: list[str]) -> Any:
    """Each rank looks into a folder of its own, or all into one."""
    shared_folder.VISIBLE_SECONDS = 0.5
    topology = initialize(ParallelConfig())
    folder = Path(folders[topology.rank])
    return told(lambda: shared_folder.check_shared(folder, topology))


def hold(folder: str) -> Any:
    """Take the folder, see that every rank may write, give it back, see that none may."""
    topology = initialize(ParallelConfig())
    lease = shared_folder.hold(Path(folder), topology)
    lease.check()
    topology.barrier()
    held = len(list(Path(folder).glob("lease.*")))
    topology.barrier()
    lease.release()
    topology.barrier()
    with contextlib.suppress(LeaseLost):
        lease.check()
        return "still held"
    return held, len(list(Path(folder).glob("lease.*")))


def bank(folder: str) -> dict[str, Any]:
    """A round written by several ranks, then read by all, then hurt in several ways."""
    topology = initialize(ParallelConfig())
    pairs, found = make_pairs(12), {}
    bank = SharedBank(folder, 7, topology)
    bank.open(0, inside=False)
    plan = bank.begin_round(0, [(i, i + 2) for i in range(0, 12, 2)])
    for part in range(topology.rank, len(plan), topology.world_size):  # its own, no more
        first, last = plan[part]
        bank.write_part(0, part, pairs[first:last])
    bank.finish_round(0)
    found["ordinals"] = [pair.ordinal for pair in bank.read_round(0)]
    found["other plan"] = bank.begin_round(0, [(0, 12)]) == plan
    for part in range(topology.rank, len(plan), topology.world_size):
        first, last = plan[part]
        for pair in pairs[first:last]:
            pair.ref_demo_logp = pair.ref_sample_logp = float(pair.ordinal)
        bank.write_part(0, part, pairs[first:last])
    found["references before"] = bank.has_references(0)
    bank.finish_round(0)
    found["references"] = bank.has_references(0)
    found["read"] = [pair.ref_demo_logp for pair in bank.read_round(0)]
    found["parts"] = PairBank(folder).parts(0)
    topology.barrier()
    found["late"] = _late_file(bank, Path(folder), topology)
    found["missing"] = _missing_file(bank, Path(folder), topology)
    return found


def _late_file(bank: SharedBank, folder: Path, topology: Topology) -> Any:
    """The other rank sees rank 0's commit a second late, as over a network file system."""
    import threading

    bank.patience = 20.0
    path = folder / "round_0000" / "part_00003.parquet"
    content = path.read_bytes()
    topology.barrier()
    if topology.is_main:
        path.unlink()
        threading.Timer(1.0, lambda: path.write_bytes(content)).start()
    topology.barrier()
    return told(lambda: [pair.ordinal for pair in bank.read_part(0, 3)])


def _missing_file(bank: SharedBank, folder: Path, topology: Topology) -> Any:
    bank.patience = 0.5
    topology.barrier()
    if topology.is_main:
        (folder / "round_0000" / "part_00005.parquet").unlink()
    topology.barrier()
    return told(lambda: len(bank.read_round(0)))


def weights(hf: str, folder: str, layout: dict[str, int]) -> dict[str, Any]:
    """Load once for all replicas: who opened files, and what everybody has."""
    topology = initialize(ParallelConfig(**layout))
    arch = architecture(read_hf_config(Path(hf)))
    config = build_config(arch, ParallelConfig(**layout), precision="fp32")
    chunks = build_chunks(config, arch, topology)
    reads = []
    original = load.load_hf_weights

    def spy(*arguments: Any, **options: Any) -> None:
        reads.append(topology.rank)
        original(*arguments, **options)

    load.load_hf_weights = spy
    try:
        load.load_hf_weights_once(chunks, arch, Path(hf), topology)
        mine = [p.detach().clone() for _, p in load.global_parameters(chunks)]
        original(chunks, arch, Path(hf), tp_rank=topology.tp_rank, tp_size=topology.tp_size)
        same = all(
            torch.equal(a, p) for a, (_, p) in zip(mine, load.global_parameters(chunks),
                                                   strict=True)
        )
        wrong = told(lambda: load.load_hf_weights_once(chunks, arch, Path(folder), topology))
    finally:
        load.load_hf_weights = original
    return {"dp_rank": topology.dp_rank, "reads": reads, "same": same, "wrong": wrong}


def checkpoint_log(hf: str, folder: str, *, differs: bool) -> list[str]:
    """Save a run's state under data parallelism; what Megatron says of the ranks' states."""
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = Listen(), logging.getLogger("megatron.core.dist_checkpointing")
    logger.addHandler(listener)
    try:
        stepper = build_trainer(hf, {}, {"lr": 1e-3})
        topology = stepper.policy.topology
        schedule = SimpleNamespace(state_dict=dict)
        state = {"step": 1, "seconds": topology.rank if differs else 0}
        Checkpointer(Path(folder), topology, keep=1).save(
            1, stepper.policy.chunks, stepper.optimizer, schedule, state
        )
    finally:
        logger.removeHandler(listener)
    return [text for text in said if "common state dict" in text]


def failing_save(hf: str, folder: str, *, rank: int, asynchronous: bool) -> Any:
    """A checkpoint whose files one rank of two cannot write."""
    import megatron_irl.storage.saving as saving

    stepper = build_trainer(hf, {"tensor_model_parallel_size": 2}, {"lr": 1e-3})
    topology = stepper.policy.topology
    checkpointer = Checkpointer(Path(folder), topology, keep=1, asynchronous=asynchronous)
    original = saving.write_buckets

    def fail(*arguments: Any, **options: Any) -> Any:
        written = original(*arguments, **options)
        if topology.rank == rank:
            raise OSError(27, "File too large")
        return written

    saving.write_buckets = fail

    def save() -> None:
        checkpointer.save(
            1, stepper.policy.chunks, stepper.optimizer, SimpleNamespace(state_dict=dict), {}
        )
        deadline = time.monotonic() + 60
        while checkpointer._pending is not None and time.monotonic() < deadline:
            checkpointer.settle_if_ended()  # as the loop does after every step

    try:
        return told(save)
    finally:
        saving.write_buckets = original
