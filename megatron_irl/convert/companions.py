"""The files of a model folder that are no weights, and the folder's way onto the disk."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# The licence travels with the weights; the model card does not, it describes the original.
MODEL_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "additional_chat_templates/*",
)


def copy_companions(
    folder: Path, source: Path, tokenizer: Path | None = None, chat_template: str | None = None
) -> None:
    """Copy what makes the weights a usable model: tokenizer, template, generation, licence."""
    tokenizer = source if tokenizer is None else Path(tokenizer)
    found = [(source, path) for pattern in MODEL_FILES for path in source.glob(pattern)]
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    else:
        patterns = TOKENIZER_FILES
        found += [(tokenizer, path) for pattern in patterns for path in tokenizer.glob(pattern)]
    for root, path in found:
        if path.is_file():
            target = folder / path.relative_to(root)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if chat_template is not None:  # this file wins over the one in tokenizer_config.json
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def write_stop_ids(folder: Path, hf_config: dict[str, Any], stop_ids: Sequence[int]) -> None:
    """Have ``generation_config.json`` list every id at which the model's answers end.

    transformers stops at the ids of that file, or of ``config.json`` where there is none, and asks
    the tokenizer nothing: a model that learnt to end with another would never stop.
    """
    file = folder / "generation_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        listed = settings.get("eos_token_id")
    else:
        names = ("bos_token_id", "pad_token_id")
        settings = {name: hf_config[name] for name in names if hf_config.get(name) is not None}
        listed = hf_config.get("eos_token_id")
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if set(stop_ids) <= set(known):
        return
    ids = list(dict.fromkeys([*stop_ids, *known]))
    settings["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def write_config(folder: Path, hf_config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write ``config.json`` with the dtype the weights were written in."""
    keys = [k for k in ("torch_dtype", "dtype") if k in hf_config] or ["dtype"]
    config = hf_config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
