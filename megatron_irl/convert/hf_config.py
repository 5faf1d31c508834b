"""``config.json`` of a Hugging Face folder. Importable without Megatron."""

import json
from pathlib import Path
from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.registry import architecture

__all__ = ["Architecture", "architecture", "read_hf_config"]


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        UserError: The folder or the file is missing, or it is not a JSON object.
    """
    path = Path(hf_dir) / "config.json"
    if (Path(hf_dir) / "adapter_config.json").exists() and not path.exists():
        raise UserError(
            f"model.hf={hf_dir} is an adapter of peft, not a model. Set adapter.path to it and "
            "model.hf to its base to train it further; to train the whole model merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(merged), and copy the tokenizer there."
        )
    if not Path(hf_dir).is_dir():
        raise UserError(
            f"model.hf={hf_dir} is not a folder. Set model.hf to a Hugging Face model folder on "
            "this machine; nothing is downloaded."
        )
    if not path.exists():
        raise UserError(f"model.hf={hf_dir} has no config.json; it is not a Hugging Face folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object.")
    return config
