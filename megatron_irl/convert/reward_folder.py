"""A Hugging Face folder of a reward model: its config, its padding, its head. No Megatron here."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_irl.convert.companions import write_config
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.hf_folder import HfWeights
from megatron_irl.errors import UserError
from megatron_irl.families.registry import FAMILIES, class_name
from megatron_irl.families.table import REWARD_ROW

(SCORE,) = (tensor.name for tensor in REWARD_ROW.hf)


def complete_reward_folder(
    folder: Path, hf_config: dict[str, Any], arch: Architecture, dtype: torch.dtype
) -> None:
    """Write the config of a folder that has weights and tokenizer, and choose its padding."""
    config = reward_config(hf_config) | {"pad_token_id": _set_padding(folder, arch.vocab_size)}
    write_config(folder, config, dtype)


def reward_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The config of a language model as that of a reward model on its backbone."""
    family = FAMILIES[class_name(hf_config) or ""]
    return hf_config | {
        "architectures": [family.classifier_name],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",  # so that pipelines leave the score as it is
    }


def read_reward_head(hf_dir: Path) -> Tensor:
    """Read the head of a folder that ``export_hf_reward`` wrote: float32 [1, H], bitwise.

    Raises:
        UserError: There is none, or it has more than one label, or is not finite.
    """
    weights = HfWeights(hf_dir)
    if SCORE not in weights.files:
        raise UserError(f"{hf_dir} has no {SCORE}; it is not a reward model. Give the hf_reward "
                        "folder of a run with algorithm.name=rft.")
    head = weights.slice(SCORE)[:].float()
    if head.dim() != 2 or head.shape[0] != 1:
        raise UserError(f"{weights.where(SCORE)}: {SCORE} has shape {list(head.shape)}; a reward "
                        "has one label, [1, hidden_size].")
    if not torch.isfinite(head).all():
        raise UserError(f"{weights.where(SCORE)}: {SCORE} holds NaN or infinity. Take another "
                        "copy, or an earlier run.")
    return head


def _set_padding(folder: Path, vocab_size: int) -> int | None:
    """Choose a padding token that ends no response, make it the folder's, return its id."""
    from megatron_irl.data.tokenizer import load_tokenizer  # seconds; conversion needs it here only

    tokenizer = load_tokenizer(folder)
    names = _special_tokens(folder)
    config = folder / "tokenizer_config.json"
    known = {tokenizer.pad_id, *names}
    if tokenizer.bos_id is not None and not config.exists():  # SentencePiece: nothing to rewrite
        known.add(tokenizer.bos_id)
    usable = [i for i in known if i not in tokenizer.stop_ids and i < vocab_size]
    if not usable:
        return None

    def rank(token_id: int) -> tuple[bool, bool, bool, bool, int]:
        """Its own first, then by name; <unk> last, since it can stand at a response's end."""
        name = names.get(token_id, "").lower()
        is_own, is_bos = token_id == tokenizer.pad_id, token_id == tokenizer.bos_id
        return not is_own, "pad" not in name, not is_bos, "unk" in name, token_id

    chosen = min(usable, key=rank)
    if chosen != tokenizer.pad_id:
        for path in (config, folder / "special_tokens_map.json"):
            if path.exists():
                settings = json.loads(path.read_text(encoding="utf-8"))
                settings["pad_token"] = names[chosen]
                path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
                                encoding="utf-8")
    return chosen


def _special_tokens(folder: Path) -> dict[int, str]:
    """Special tokens by id, as tokenizer.json spells them; none where there is no such file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
    return {token["id"]: token["content"] for token in added if token.get("special")}
