"""Megatron distributed checkpoints that hold a model and nothing else; used by the tools.

Any tensor and pipeline parallel layout can read what another one wrote, and a run's checkpoint
reads like one written here.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_irl.config import load_recipe
from megatron_irl.convert.export import copy_companions
from megatron_irl.data.files import disk_errors
from megatron_irl.errors import UserError
from megatron_irl.parallel.topology import Topology

from megatron.core import dist_checkpointing  # isort: skip  (after the platform)

# Megatron-LM's names for weights that no iteration of training belongs to.
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
HF_PART = "hf"


def save_megatron(
    chunks: Sequence[nn.Module], out_dir: Path, *, hf_dir: Path, topology: Topology
) -> None:
    """Write ``out_dir``: the checkpoint, and config and tokenizer for the way back.

    The folder appears whole or not at all. Collective over every rank.

    Raises:
        UserError: ``out_dir`` exists, or the disk is full.
    """
    if out_dir.exists():
        raise UserError(f"--out {out_dir} exists. Choose another folder, or remove it.")
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if topology.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / RELEASE).mkdir(parents=True)
    topology.barrier()
    with disk_errors(out_dir, cleanup=partial):
        common = {"checkpoint_version": 3.0, "iteration": 0}
        dist_checkpointing.save(common | _sharded(chunks, topology), str(partial / RELEASE))
        if topology.is_main:
            (partial / HF_PART).mkdir()
            copy_companions(partial / HF_PART, hf_dir)
            shutil.copyfile(hf_dir / "config.json", partial / HF_PART / "config.json")
            (partial / TRACKER).write_text(RELEASE)
            os.replace(partial, out_dir)
    topology.barrier()


def load_megatron(chunks: Sequence[nn.Module], checkpoint: Path, topology: Topology) -> None:
    """Fill the chunks from a folder that ``find_checkpoint`` returned. Collective.

    Raises:
        UserError: The checkpoint is damaged, or of another model.
    """
    prefix = _prefix_and_dtype(checkpoint)[0]
    try:
        loaded: Any = dist_checkpointing.load(
            _sharded(chunks, topology, prefix), str(checkpoint)
        )
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read into this model: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    for index, chunk in enumerate(chunks):
        state = {n.removeprefix(prefix): t for n, t in loaded[f"model{index}"].items()}
        missing = {name for name, _ in chunk.named_parameters()} - set(state)
        assert not missing, f"not in the sharded state: {sorted(missing)}"
        chunk.load_state_dict(state, strict=False)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself: ``path``, or the newest of a run folder or a Megatron-LM folder.

    Raises:
        UserError: There is none.
    """
    if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        return path
    if (path / TRACKER).is_file():
        text = (path / TRACKER).read_text().strip()
        return path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    for folder in (path / "checkpoints", path):
        steps = sorted(p for p in folder.glob("step_*") if p.name[5:].isdigit())
        if steps:
            return max(steps, key=lambda p: int(p.name[5:]))
    raise UserError(
        f"--checkpoint {path} is neither a Megatron distributed checkpoint nor a folder of them "
        f"(a run folder, or one with {TRACKER})."
    )


def find_hf_source(checkpoint: Path) -> Path:
    """The HF folder whose config and tokenizer belong to a checkpoint.

    Raises:
        UserError: Neither a run's ``recipe.yaml`` nor an ``hf/`` folder is near it.
    """
    for folder in list(checkpoint.resolve().parents)[:2]:
        if (folder / "recipe.yaml").is_file():
            source = Path(load_recipe(folder / "recipe.yaml", []).model.hf)
            if source.is_dir():  # a run may outlive the model it started from
                return source
        if (folder / HF_PART / "config.json").is_file():
            return folder / HF_PART
    raise UserError(
        f"nothing near {checkpoint} says which model it is of. Set --hf to a Hugging Face folder "
        "with its config.json and tokenizer."
    )


def checkpoint_dtype(checkpoint: Path) -> torch.dtype:
    """The dtype of the model's weights in a checkpoint.

    Raises:
        UserError: It holds no GPTModel.
    """
    return _prefix_and_dtype(checkpoint)[1]


def _prefix_and_dtype(checkpoint: Path) -> tuple[str, torch.dtype]:
    # Megatron's own load_tensors_metadata does not keep up with torch's metadata fields.
    tensors = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    for prefix in ("", "module."):  # bare, and as saved from inside the data-parallel wrapper
        norm = tensors.get(f"{prefix}decoder.final_layernorm.weight")
        if isinstance(norm, TensorStorageMetadata):
            return prefix, norm.properties.dtype
    raise UserError(f"the checkpoint {checkpoint} does not hold a GPTModel's weights.")


def _sharded(chunks: Sequence[Any], topology: Topology, prefix: str = "") -> dict[str, Any]:
    metadata = {"singleton_local_shards": False, "dp_cp_group": topology.dp_group}
    parts = [chunk.sharded_state_dict(prefix=prefix, metadata=metadata) for chunk in chunks]
    # FP8 scales and the like: no part of the model, and absent where the layers are not TE's.
    return {
        f"model{i}": {n: t for n, t in part.items() if not n.endswith("_extra_state")}
        for i, part in enumerate(parts)
    }
