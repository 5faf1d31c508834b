"""Save and resume through Megatron's distributed checkpointing, committed by rename.

A checkpoint holds the model, the optimizer, the schedule, the random states and the run's
position. It can be read under any tensor, pipeline and data parallel layout. A folder named
``step_NNNNNN`` is always whole: it is written under a dotted name and renamed last.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_irl import hardware
from megatron_irl.convert.checkpoint_reader import first_line
from megatron_irl.convert.megatron_folder import adapt_to_spec, fill
from megatron_irl.errors import UserError
from megatron_irl.parallel.reduce import from_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.adam_state import loadable, make_savable
from megatron_irl.storage.commit import disk_errors

from megatron.core import dist_checkpointing, tensor_parallel  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject  # isort: skip
from megatron.core.utils import unwrap_model  # isort: skip

FORMAT_VERSION = 1


class Checkpointer:
    """The ``checkpoints/`` folder of one run.

    Args:
        folder: Where ``step_NNNNNN`` folders live.
        keep: Newest checkpoints kept; older ones are removed after a newer one is whole.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int) -> None:
        self.folder, self.topology, self.keep = folder, topology, keep

    def put_back(self) -> None:
        """Undo a replacement that was killed between its two renames.

        For the run itself, before it looks for its newest checkpoint: to anybody else a
        replacement in progress looks the same.
        """
        if not self.topology.is_main:
            return
        for old in self.folder.glob(".step_*.old"):
            final = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                os.replace(old, final)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> int | None:
        """The newest whole checkpoint as rank 0 sees it, on every rank. Collective."""
        steps = self.steps() if self.topology.is_main else []
        return from_main(steps[-1] if steps else None, self.topology)

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
        final, partial = self.path(step), self.folder / f".step_{step:06d}.partial"
        if self.topology.is_main:
            with disk_errors(final, cleanup=partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self.topology.barrier()
        make_savable(optimizer)
        sharded = self._sharded(chunks, optimizer, is_loading=False)
        sharded |= {
            "scheduler": scheduler.state_dict(), "state": state, "layout": self._layout(),
            "format_version": FORMAT_VERSION,
        }
        with disk_errors(final, cleanup=partial):
            _write(sharded, partial, sum(p.nbytes for c in chunks for p in c.parameters()))
        if self.topology.is_main:
            _replace_folder(partial, final)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.topology.barrier()

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
            cause = next(iter(error.failures.values()))[0]
            raise UserError(
                f"the checkpoint {path} cannot be read: {first_line(cause)}"
            ) from error
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
        return model | {
            "optimizer": optimizer.sharded_state_dict(model, is_loading, metadata=metadata),
            "rng": self._rng(),
        }

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


def _write(sharded: dict[str, Any], folder: Path, weight_bytes: int) -> None:
    """Save, with a full disk reported as one.

    Megatron's writer processes keep only the kind of an error, in a class that is no ``Exception``;
    too little free space for this rank's bare weights says what happened.
    """
    try:
        dist_checkpointing.save(sharded, str(folder))
    except CheckpointException as error:
        if shutil.disk_usage(folder).free > weight_bytes and "OSError" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _replace_folder(new: Path, final: Path) -> None:
    """Put ``new`` in the place of ``final``, which is moved aside first, never half deleted."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _tracker() -> Any:
    """Megatron's tracker of the random states of model-parallel regions."""
    return tensor_parallel.get_cuda_rng_tracker()
