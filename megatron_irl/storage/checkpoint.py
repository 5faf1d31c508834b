"""Save and resume through Megatron's distributed checkpointing, committed by rename.

A checkpoint holds the model, the optimizer, the schedule, the random states and the run's
position. It can be read under any tensor, pipeline and data parallel layout. A folder named
``step_NNNNNN`` is always whole: it is written under a dotted name and renamed last.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_irl import hardware
from megatron_irl.compat import checkpoint_writer
from megatron_irl.compat.adam_state import loadable, make_savable
from megatron_irl.convert.checkpoint_reader import first_line
from megatron_irl.convert.megatron_folder import adapt_to_spec, fill
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.errors import UserError
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.commit import (
    commit_folder,
    fresh_folder,
    put_back,
    unfinished,
    write_errors,
)

from megatron.core import dist_checkpointing, tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip

FORMAT_VERSION = 1
_ADVICE = ("The previous checkpoint is untouched; free some space, then start the same command "
           "again.")


class Checkpointer:
    """The ``checkpoints/`` folder of one run.

    Args:
        folder: Where ``step_NNNNNN`` folders live.
        keep: Newest checkpoints kept; older ones are removed after a newer one is whole.
        fence: Called on rank 0 before each commit; raises if the folder is not ours any more.
    """

    def __init__(
        self, folder: Path, topology: Topology, *, keep: int,
        fence: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.topology, self.keep = folder, topology, keep
        self._fence = fence or (lambda: None)
        checkpoint_writer.install()

    def put_back(self) -> None:
        """Undo a replacement that was killed between its two renames.

        For the run itself, before it looks for its newest checkpoint: to anybody else a
        replacement in progress looks the same.
        """
        if not self.topology.is_main:
            return
        for old in self.folder.glob(".step_*.old"):
            put_back(self.folder / old.name.removeprefix(".").removesuffix(".old"))

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> int | None:
        """The newest whole checkpoint as rank 0 sees it, on every rank. Collective."""
        return on_main(lambda: (self.steps() or [None])[-1], self.topology)

    def describe_latest(self) -> str:
        """The newest checkpoint's path, for messages."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "the starting model; no checkpoint yet"

    def save(
        self, step: int, chunks: Sequence[Any], optimizer: Any, scheduler: Any,
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint for ``step``. Collective over every rank.

        Raises:
            UserError: The disk is full or not writable; the previous checkpoint is untouched.
        """
        final = self.path(step)
        partial = unfinished(final)
        on_main(lambda: self._begin(final, partial), self.topology)
        make_savable(optimizer)
        sharded = self._sharded(chunks, optimizer, is_loading=False)
        sharded |= {
            "scheduler": scheduler.state_dict(), "state": state, "layout": self._layout(),
            "format_version": FORMAT_VERSION,
        }
        failure: BaseException | None = None
        with write_errors(final, _ADVICE):
            try:
                dist_checkpointing.save(sharded, str(partial))
            except CheckpointException as error:
                # No ``Exception``, and on every rank at once: rank 0 alone knows what happened.
                # Any other error is one rank's own; the rest wait until the launcher ends them.
                failure = error
        on_main(lambda: self._commit(final, partial, failure), self.topology)

    def _begin(self, final: Path, partial: Path) -> None:
        self._fence()
        with write_errors(final, _ADVICE):
            fresh_folder(partial)

    def _commit(self, final: Path, partial: Path, failure: BaseException | None) -> None:
        try:
            with write_errors(final, _ADVICE):
                if failure is not None:
                    raise OSError(f"{final} was not written: {_words(failure)}") from failure
                self._fence()
                commit_folder(partial, final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def load(
        self, step: int, chunks: Sequence[Any], optimizer: Any = None, scheduler: Any = None
    ) -> dict[str, Any]:
        """Restore a checkpoint in place; returns the ``state`` saved with it. Collective.

        Without ``optimizer`` only the model is read.

        Raises:
            UserError: The checkpoint is of another format, or lacks what was asked for.
        """
        path = self.path(step)
        if not path.is_dir():
            raise UserError(f"{path} does not exist; the run has {self.steps()} checkpoints.")
        with loadable(optimizer):
            loaded = self._read(path, chunks, optimizer)
            if optimizer is not None:
                optimizer.load_state_dict(loaded["optimizer"])
                scheduler.num_steps = 0  # loading counts on from where the schedule stands
                scheduler.load_state_dict(loaded["scheduler"])
                self._load_rng(loaded)
        for index, chunk in enumerate(unwrap_model(list(chunks))):
            fill(chunk, loaded[f"model{index}"])
        return loaded["state"]

    def _read(self, path: Path, chunks: Sequence[Any], optimizer: Any) -> dict[str, Any]:
        """This rank's part of a checkpoint; tensors are read into model and optimizer in place."""
        # Before Megatron unpickles the same file without a look at what is in it.
        everywhere(lambda: read_metadata(path), self.topology)
        try:
            common = dist_checkpointing.load_common_state_dict(str(path))
            if common.get("format_version") != FORMAT_VERSION:
                raise UserError(
                    f"the checkpoint {path} has format {common.get('format_version')}, this "
                    f"version reads {FORMAT_VERSION}. Use the megatron_irl version that wrote it."
                )
            sharded = self._sharded(chunks, optimizer, is_loading=True)
            models = {name: part for name, part in sharded.items() if name.startswith("model")}
            adapt_to_spec(models, path)
            if common.get("layout") != self._layout():
                sharded.pop("rng", None)
            loaded: Any = dist_checkpointing.load(sharded, str(path))
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
            # Gathered in the host memory of one data-parallel rank (see build_optimizer); otherwise
            # every GPU would hold the whole fp32 state for a moment.
            "distrib_optim_fully_reshardable_mem_efficient": True,
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
        state = optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        if not is_loading:
            _drop_what_is_elsewhere(state)
        return model | {"optimizer": state, "rng": self._rng()}

    def _layout(self) -> tuple[int, int]:
        """What the saved random states are split by."""
        return self.topology.tp_size, self.topology.pp_size

    def _rng(self) -> ShardedObject:
        # Saved per (pipeline, tensor) rank. Sampling and data order have seeds of their own, so
        # these matter to dropout only and may be left alone when the layout changes.
        t = self.topology
        states = {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "tracker": _tracker().get_states(),
            "device": hardware.get_rng_state(),
        }
        return ShardedObject(
            "rng", states, (t.pp_size, t.tp_size), (t.pp_rank, t.tp_rank), replica_id=t.dp_rank,
        )

    def _load_rng(self, loaded: dict[str, Any]) -> None:
        states = loaded.get("rng")
        if not isinstance(states, dict):
            return
        torch.set_rng_state(states["torch"])
        np.random.set_state(states["numpy"])
        _tracker().set_states(states["tracker"])
        hardware.set_rng_state(states["device"])


def _drop_what_is_elsewhere(optimizer: Any) -> None:
    """Take out the None that ranks other than the gathering one have for the optimizer's tensors.

    It would make their common state differ from rank 0's, and Megatron's check of that cry wolf.
    """
    if isinstance(optimizer, dict):
        if "param_state" in optimizer and optimizer["param_state"] is None:
            del optimizer["param_state"]
        for part in optimizer.values():
            _drop_what_is_elsewhere(part)


def _words(error: BaseException) -> str:
    """What happened, of torch's exception for all ranks; only rank 0 is told."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    return first_line(next(iter(failures.values()))[0])


def _tracker() -> Any:
    """Megatron's tracker of the random states of model-parallel regions."""
    return tensor_parallel.get_cuda_rng_tracker()
