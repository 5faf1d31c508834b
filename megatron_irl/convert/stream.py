"""HF folder ↔ Megatron distributed checkpoint in one process, in the memory of a few tensors.

No model is built and no rank is started: the checkpoint's global tensors are what one
tensor-parallel rank would hold, and any layout reads its shards of them.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import megatron_irl
from megatron_irl.config import hub_snapshot
from megatron_irl.convert.certificate import NOTE
from megatron_irl.convert.checkpoint_reader import CheckpointReader
from megatron_irl.convert.checkpoint_writer import CheckpointWriter
from megatron_irl.convert.companions import copy_companions, write_config
from megatron_irl.convert.hf_config import Architecture, architecture, read_hf_config
from megatron_irl.convert.hf_folder import HfWeights, validate_hf_folder
from megatron_irl.convert.load import check_tied_head, refuse_not_finite
from megatron_irl.convert.locate import HF_PART, RELEASE, TRACKER
from megatron_irl.convert.peft_folder import model_folder
from megatron_irl.convert.reward_folder import complete_reward_folder
from megatron_irl.convert.safetensors_writer import DTYPES, ShardedWriter, TensorPlan
from megatron_irl.convert.staging import Staging, file_stamps
from megatron_irl.errors import UserError
from megatron_irl.families.table import (
    EMBEDDING,
    Row,
    cast_to,
    heads,
    hf_head,
    hf_tensors,
    row_groups,
    rows,
)
from megatron_irl.storage.commit import write_file

OnProgress = Callable[[str, int], None]
"""Called with what was done (a layer, say) and its bytes."""

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Conversion:
    """A conversion that was checked and can run.

    Attributes:
        plan: What will be written, in lines for people.
        total_bytes: Of the written tensors.
        run: Do it.
    """

    plan: list[str]
    total_bytes: int
    run: Callable[[OnProgress], None]


def hf_to_megatron(hf_dir: Path, out_dir: Path, *, dtype: torch.dtype | None = None) -> Conversion:
    """Plan a checkpoint from a folder; ``dtype`` None keeps each tensor's own.

    Raises:
        UserError: The folder is damaged or of an architecture that is not supported; ``out_dir``
            exists or would not fit. Running also refuses NaN and infinite weights.
    """
    hf_dir = hub_snapshot(hf_dir)
    hf_config = read_hf_config(model_folder(hf_dir))
    arch = architecture(hf_config, reward_model=True)
    validate_hf_folder(hf_dir, arch)
    weights = HfWeights(hf_dir)

    def dtype_of(row: Row) -> torch.dtype:
        if dtype is not None:
            return cast_to(row, dtype)
        kinds = [_BY_NAME[weights.slice(t.name).get_dtype()] for t in row.hf]
        return functools.reduce(torch.promote_types, kinds)

    dtypes = {row.megatron: dtype_of(row) for row in rows(arch)}
    sizes = _group_bytes(arch, dtypes)
    staging = Staging(out_dir, {
        "from": str(hf_dir.resolve()), "files": file_stamps(hf_dir, "*.safetensors"),
        "config": hf_config, "dtype": str(dtype), "version": megatron_irl.__version__,
    })
    staging.check_space(sum(sizes))

    def run(on_progress: OnProgress) -> None:
        with staging.open() as folder:
            (folder / RELEASE).mkdir(exist_ok=True)
            writer = CheckpointWriter(folder / RELEASE, arch, lambda row: dtypes[row.megatron])
            for index, (label, _) in enumerate(writer.groups):
                if not writer.is_written(index):
                    writer.write(index, lambda row: _read_hf(weights, row, arch, dtypes))
                    weights.close()
                on_progress(label, sizes[index])
            writer.finish()
            shutil.rmtree(folder / HF_PART, ignore_errors=True)
            (folder / HF_PART).mkdir()
            copy_companions(folder / HF_PART, model_folder(hf_dir))
            shutil.copyfile(model_folder(hf_dir) / "config.json", folder / HF_PART / "config.json")
            (folder / TRACKER).write_text(RELEASE)
            _write_note(folder, hf_dir, dtype)

    plan = _describe(arch, dtypes, sizes)
    return Conversion([f"{hf_dir} → {out_dir / RELEASE}", *plan], sum(sizes), run)


def megatron_to_hf(
    checkpoint: Path, out_dir: Path, *, hf_dir: Path, dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9, reward: bool = False,
) -> Conversion:
    """Plan an HF folder from a checkpoint of any layout; ``hf_dir`` gives config and tokenizer.

    With ``reward`` it is the reward model of a run's checkpoint: the backbone and the reward head.
    A checkpoint made from a reward model becomes one either way.

    Raises:
        UserError: The checkpoint is damaged or of another model; ``out_dir`` exists or would not
            fit. Running also refuses damaged files, and NaN and infinite weights.
    """
    hf_dir = hub_snapshot(hf_dir)
    hf_config = read_hf_config(model_folder(hf_dir))
    source = architecture(hf_config, reward_model=True)
    arch = dataclasses.replace(source, reward=reward or source.reward)
    reader = CheckpointReader(checkpoint)
    reader.check(arch)
    written = {
        row.megatron: cast_to(row, dtype) if dtype else reader.dtype_of(row, arch)
        for row in rows(arch)
    }
    sizes = _group_bytes(arch, written)
    tensors = [
        TensorPlan(t.name, t.shape(arch), written[row.megatron])
        for row in rows(arch) for t in row.hf
    ]
    staging = Staging(out_dir, {
        "from": str(checkpoint.resolve()), "files": file_stamps(checkpoint, "*"),
        "config": hf_config, "dtype": str(dtype), "shard": max_shard_bytes, "reward": arch.reward,
        "version": megatron_irl.__version__,
    })
    staging.check_space(sum(sizes))

    def run(on_progress: OnProgress) -> None:
        with staging.open() as folder:
            journal = folder / ".groups_done"
            done = int(journal.read_text()) if journal.exists() else 0
            writer = ShardedWriter(folder, tensors, max_shard_bytes, resume=done > 0)
            for index, (label, group) in enumerate(row_groups(arch)):
                if index >= done:
                    for row in group:
                        _write_hf(writer, row, reader.read(row, arch), arch)
                    writer.flush()
                    write_file(journal, str(index + 1).encode())
                on_progress(label, sizes[index])
            writer.close()
            copy_companions(folder, model_folder(hf_dir))
            if arch.reward and not source.reward:
                complete_reward_folder(folder, hf_config, arch, written[EMBEDDING])
            else:
                write_config(folder, hf_config, written[EMBEDDING])
            _write_note(folder, checkpoint, dtype)
            journal.unlink()

    plan = _describe(arch, written, sizes)
    return Conversion([f"{checkpoint} → {out_dir}", *plan], sum(sizes), run)


def _read_hf(
    weights: HfWeights, row: Row, arch: Architecture, dtypes: dict[str, torch.dtype]
) -> Tensor:
    tensor = row.transform.read([weights.slice(t.name) for t in row.hf], 0, 1, heads(arch))
    if row.megatron == EMBEDDING and arch.tie_word_embeddings and hf_head(arch) in weights.files:
        check_tied_head(weights, row, tensor, 0, 1, arch)
    tensor = tensor.to(dtypes[row.megatron])
    if not is_finite(tensor):
        refuse_not_finite(weights, row, tensor.dtype)
    return tensor


def _write_hf(writer: ShardedWriter, row: Row, tensor: Tensor, arch: Architecture) -> None:
    if not is_finite(tensor):
        raise UserError(
            f"NaN or infinite weights: {row.megatron}. The checkpoint is damaged, or its training "
            "diverged; take another one."
        )
    for hf, value in zip(row.hf, hf_tensors(row, [tensor], arch), strict=True):
        writer.add(hf.name, value)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass that allocates nothing."""
    low, high = torch.aminmax(tensor)  # both are NaN if any element is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _group_bytes(arch: Architecture, dtypes: dict[str, torch.dtype]) -> list[int]:
    return [
        sum(torch.Size(row.shape(arch)).numel() * dtypes[row.megatron].itemsize for row in group)
        for _, group in row_groups(arch)
    ]


def _describe(
    arch: Architecture, dtypes: dict[str, torch.dtype], sizes: list[int]
) -> list[str]:
    count = sum(torch.Size(row.shape(arch)).numel() for row in rows(arch))
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    largest = max(torch.Size(r.shape(arch)).numel() * dtypes[r.megatron].itemsize
                  for r in rows(arch))
    tied = "tied embeddings" if arch.tie_word_embeddings else "untied embeddings"
    return [
        f"{arch.family}, {arch.transformer['num_layers']} layers, {count / 1e9:.3f} B parameters, "
        f"{'reward head' if arch.reward else tied}",
        f"{sum(sizes) / 1e9:.3f} GB as {', '.join(kinds)}; largest tensor {largest / 1e9:.3f} GB",
    ]


def _write_note(folder: Path, source: Path, dtype: torch.dtype | None) -> None:
    """Say that the folder was converted, from what and by which versions."""
    note = {
        "converted_from": str(source.resolve()),
        "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
        "megatron_irl": megatron_irl.__version__, "torch": str(torch.__version__),
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")
