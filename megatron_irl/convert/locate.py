"""Which checkpoint a path means, and which HF folder belongs to it."""

from pathlib import Path

from megatron_irl.config import load_recipe
from megatron_irl.config.run_files import CHECKPOINTS, HF, RECIPE
from megatron_irl.errors import UserError

# Megatron-LM's names for weights that no iteration of training belongs to.
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
HF_PART = HF  # config and tokenizer, beside a converted checkpoint too


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself: ``path``, or the newest of a run folder or a Megatron-LM folder.

    Raises:
        UserError: There is none.
    """
    if (path / "metadata.json").is_file():
        return path
    if (path / TRACKER).is_file():
        text = (path / TRACKER).read_text().strip()
        if text == RELEASE:
            return path / RELEASE
        if text.isdigit():
            return path / f"iter_{int(text):07d}"
        raise UserError(f"{path / TRACKER} holds {text[:40]!r}, which names no iteration.")
    for folder in (path / CHECKPOINTS, path):
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
        if (folder / RECIPE).is_file():
            source = Path(load_recipe(folder / RECIPE, check_files=False).model.hf)
            if source.is_dir():  # a run may outlive the model it started from
                return source
        if (folder / HF_PART / "config.json").is_file():
            return folder / HF_PART
    raise UserError(
        f"nothing near {checkpoint} says which model it is of. Set --hf to a Hugging Face folder "
        "with its config.json and tokenizer."
    )
