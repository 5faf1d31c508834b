"""Save and resume through Megatron's distributed checkpointing, committed by rename.

A checkpoint holds the model, the optimizer, the schedule, the random states and the run's
position. It can be read under any tensor, pipeline and data parallel layout. A folder named
``step_NNNNNN`` is always whole: it is written under a dotted name and renamed last. Every rank
writes its part, in the background unless told otherwise; training waits while its state is copied.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_irl.compat.adam_state import loadable, make_savable
from megatron_irl.compat.checkpoint_writer import PlanOnly
from megatron_irl.compat.optimizer_blocks import in_blocks
from megatron_irl.compat.optimizer_parts import as_one, as_parts
from megatron_irl.compat.shard_overlaps import compared_by_place
from megatron_irl.compat.threaded_reader import in_threads
from megatron_irl.convert.checkpoint_reader import first_line
from megatron_irl.convert.megatron_folder import adapt_to_spec, fill
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.errors import UserError
from megatron_irl.hardware.host_copy import copy_to_host, threads_for_files
from megatron_irl.parallel.agreement import agree
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.checkpoint_folder import CheckpointFolder
from megatron_irl.storage.commit import fresh_folder, unfinished, write_errors
from megatron_irl.storage.damage import Verify, damage
from megatron_irl.storage.random_states import random_states, restore_random_states
from megatron_irl.storage.saving import ADVICE, Saving

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # isort: skip
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    TorchDistLoadShardedStrategy,
)
from megatron.core.utils import unwrap_model  # isort: skip

FORMAT_VERSION = 1


class Checkpointer(CheckpointFolder):
    """The ``checkpoints/`` folder of one run, written and read by all of its ranks.

    Example:
        checkpointer = Checkpointer(folder, topology, keep=2)
        checkpointer.save(step, policy.chunks, optimizer, scheduler, {"round": 0})
        newest = checkpointer.latest()
        state = checkpointer.load(newest, policy.chunks, optimizer, scheduler)

    Args:
        folder: Where ``step_NNNNNN`` folders live.
        keep: Newest checkpoints kept; older ones are removed after a newer one is whole.
        keep_every: Those of steps that this divides are kept besides.
        asynchronous: Write in the background: ``save`` returns once the state is copied.
        verify: What ``latest`` compares with a checkpoint's manifest.
        fence: Called on rank 0 before each commit; raises if the folder is not ours any more.

    Attributes:
        passed_over: What ``latest`` found damaged, a sentence each.
        measured: Seconds and bytes of the newest save that was committed, by name of the metric;
            on rank 0.
    """

    def __init__(
        self, folder: Path, topology: Topology, *, keep: int, keep_every: int | None = None,
        asynchronous: bool = False, verify: Verify = "hashes",
        fence: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(folder, keep=keep, keep_every=keep_every)
        self.topology, self.asynchronous = topology, asynchronous
        self.verify: Verify = verify
        self.passed_over: list[str] = []
        self.measured: dict[str, float] = {}
        self._fence = fence or (lambda: None)
        self._pending: tuple[Saving, Callable[[], None]] | None = None
        self._distribution: Any = None  # of replicated tensors over their ranks; by Megatron

    def clean(self) -> None:
        """Make good what a kill left; for the run itself, before it looks for its checkpoint.

        Collective: what rank 0 cannot mend is every rank's error.
        """
        def mend() -> None:
            self.put_back()
            self.discard_unfinished()

        on_main(mend, self.topology)

    # --- saving

    def save(
        self, step: int, chunks: Sequence[Any], optimizer: Any, scheduler: Any,
        state: dict[str, Any], then: Callable[[], None] | None = None,
    ) -> None:
        """Write a checkpoint for ``step``. Collective over every rank.

        An earlier one that is still being written is waited for.

        Args:
            then: Called on every rank after the checkpoint is in its place: by this call, or if it
                is written in the background by ``settle`` or ``wait``.

        Raises:
            UserError: The disk is full or not writable; the previous checkpoint is untouched.
        """
        self.wait()
        start = time.perf_counter()
        final = self.path(step)
        partial = unfinished(final)
        on_main(lambda: self._begin(final, partial), self.topology)  # then everybody writes there
        make_savable(optimizer)
        with in_blocks(optimizer):
            sharded = self._sharded(chunks, optimizer, is_loading=False)
        sharded |= {
            "scheduler": scheduler.state_dict(), "state": state, "layout": self._layout(),
            "format_version": FORMAT_VERSION,
        }
        plan = self._planned(sharded, partial)
        saving = Saving(
            final, partial, plan, self.topology.rank, self.topology.world_size, self._fence,
            committed=lambda: self.prune(step), notes={"step": step},
        )
        self._pending = saving, then or (lambda: None)
        if self.asynchronous:
            _copy_out(plan)  # waits for the device; from here on the next step may write
        saving.stall_seconds = time.perf_counter() - start
        if self.asynchronous:
            saving.start()
        else:
            self.wait()

    def status(self) -> tuple[int, int]:
        """(whether a save is still being written, whether it has failed) on this rank, 0 or 1."""
        return (0, 0) if self._pending is None else self._pending[0].status()

    def settle(self, busy: int, failed: int) -> None:
        """Finish with a save that has ended in the background, if one has. Collective.

        Args:
            busy, failed: The largest ``status`` of all ranks.

        Raises:
            UserError: It has failed, on every rank.
        """
        if failed or not busy:
            self.wait()

    def settle_if_ended(self) -> None:
        """Agree on the ``status``, and settle. Collective."""
        if self._pending is not None:
            self.settle(*agree(self.status(), self.topology))

    def wait(self) -> None:
        """Wait until the save in the background, if any, is committed. Collective.

        Raises:
            UserError: As ``save``.
        """
        if self._pending is None:
            return
        start = time.perf_counter()
        saving, then = self._pending
        self._pending = None
        try:
            # First that all have written: the commit waits for every rank's report, and without
            # this would wait for that of a rank whose disk is full.
            everywhere(saving.write, self.topology)
            on_main(saving.commit, self.topology)
        except BaseException:
            saving.abandon()
            raise
        saving.stall_seconds += time.perf_counter() - start
        self.measured = {
            "checkpoint/stall_seconds": saving.stall_seconds,
            "checkpoint/background_seconds": saving.background_seconds,
            "checkpoint/bytes": saving.bytes,
        }
        then()

    def take_measured(self) -> dict[str, float]:
        """``measured``, once."""
        measured, self.measured = self.measured, {}
        return measured

    def abandon(self) -> None:
        """Give up a save that is still being written, as a kill would. Not collective."""
        if self._pending is not None:
            self._pending[0].abandon()
            self._pending = None

    def _begin(self, final: Path, partial: Path) -> None:
        self._fence()
        with write_errors(final, ADVICE):
            fresh_folder(partial)

    def _planned(self, sharded: Any, partial: Path) -> PlanOnly:
        """What this rank has to write: its own, and its share of what other ranks have too."""
        plan = PlanOnly(threads_for_files())
        strategy: Any = FullyParallelSaveStrategyWrapper(
            plan, self.topology.dp_group, do_cache_distribution=True  # type: ignore[arg-type]
        )
        # Which rank writes what several have is settled by a collective, once: it does not change.
        is_first = self._distribution is None
        strategy.cached_distribution = self._distribution
        with compared_by_place():
            dist_checkpointing.save(
                sharded, str(partial), strategy, async_sharded_save=True,
                validate_access_integrity=is_first,  # what there is does not change within a run
            )
        self._distribution = strategy.cached_distribution
        return plan

    # --- choosing and loading

    def latest(self) -> int | None:
        """The newest intact checkpoint, on every rank; None where there is none at all. Collective.

        What was found damaged on the way is in ``passed_over``.

        Raises:
            UserError: There are checkpoints, and every one of them is damaged.
        """
        self.passed_over = []
        for step in on_main(lambda: self.steps()[::-1], self.topology):
            wrong = damage(self.path(step), self.verify, self.topology)
            if wrong is None:
                return step
            self.passed_over.append(wrong)
        if self.passed_over:
            raise UserError(
                f"no checkpoint in {self.folder} is intact: {'; '.join(self.passed_over)}. "
                f"Restore one of them, or remove {self.folder} to begin again from the starting "
                "model."
            )
        return None

    def load(
        self, step: int, chunks: Sequence[Any], optimizer: Any = None, scheduler: Any = None
    ) -> dict[str, Any]:
        """Restore a checkpoint in place; returns the ``state`` saved with it. Collective.

        Without ``optimizer`` only the model is read.

        Raises:
            UserError: The checkpoint is of another format, or lacks what was asked for.
        """
        path = self.path(step)
        with loadable(optimizer), in_blocks(optimizer):
            loaded = self._read(path, chunks, optimizer)
            if optimizer is not None:
                optimizer.load_state_dict(as_parts(loaded["optimizer"], optimizer))
                scheduler.num_steps = 0  # loading counts on from where the schedule stands
                scheduler.load_state_dict(loaded["scheduler"])
                restore_random_states(loaded.get("rng"))
        for index, chunk in enumerate(unwrap_model(list(chunks))):
            fill(chunk, loaded[f"model{index}"])
        return loaded["state"]

    def _read(self, path: Path, chunks: Sequence[Any], optimizer: Any) -> dict[str, Any]:
        """This rank's part of a checkpoint; tensors are read into model and optimizer in place."""
        def read_small() -> tuple[Any, Any]:
            if not path.is_dir():
                raise UserError(f"{path} does not exist; the run has the steps {self.steps()}.")
            # First, for Megatron unpickles the same file without a look at what is in it.
            return read_metadata(path), dist_checkpointing.load_common_state_dict(str(path))

        try:
            # What each rank reads by itself, before anything in which the others would wait for
            # one that cannot. The tensors' errors torch shares out itself.
            _, common = everywhere(read_small, self.topology)
            if common.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"the checkpoint {path} has format {common.get('format_version')}, this "
                    f"version reads {FORMAT_VERSION}. Use the megatron_irl version that wrote it."
                )
            sharded = self._sharded(chunks, optimizer, is_loading=True)
            models = {name: part for name, part in sharded.items() if name.startswith("model")}
            everywhere(lambda: adapt_to_spec(models, path), self.topology)
            if common.get("layout") != self._layout():  # each (pp, tp) place has random states
                sharded.pop("rng", None)
            strategy: Any = FullyParallelLoadStrategyWrapper(
                TorchDistLoadShardedStrategy(), self.topology.dp_group
            )
            with in_threads(), compared_by_place():
                loaded: Any = dist_checkpointing.load(sharded, str(path), strategy)
        except CheckpointException as error:  # torch's; what happened is inside, by rank
            raise UserError(f"the checkpoint {path} cannot be read: {_words(error)}") from error
        except dist_checkpointing.core.CheckpointingException as error:
            raise UserError(f"the checkpoint {path} cannot be read: {error}") from error
        if optimizer is not None and "optimizer" not in loaded:
            raise UserError(f"the checkpoint {path} holds no optimizer state.")
        return loaded

    def _sharded(self, chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> Any:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.topology.dp_group,
        }
        model = {
            f"model{index}": chunk.sharded_state_dict(metadata=metadata)
            for index, chunk in enumerate(unwrap_model(list(chunks)))  # wrapped or bare: same keys
        }
        if optimizer is None:
            return model
        state = as_one(optimizer.sharded_state_dict(model, is_loading, metadata=metadata))
        return model | {"optimizer": state, "rng": random_states(self.topology)}

    def _layout(self) -> tuple[int, int]:
        """What the saved random states are split by."""
        return self.topology.tp_size, self.topology.pp_size


def _copy_out(plan: PlanOnly) -> None:
    """Copy all that is to be written out of the reach of the next step."""
    copies = iter(copy_to_host([t for bucket in plan.buckets for t in bucket.tensors()]))
    for bucket in plan.buckets:
        bucket.replace_tensors(copies)


def _words(error: BaseException) -> str:
    """What happened, of torch's exception for all ranks; only rank 0 is told."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    return first_line(next(iter(failures.values()))[0])
