"""The learned reward ↔ a Hugging Face sequence-classification folder with one label.

``AutoModelForSequenceClassification`` reads its score at the last token that is not padding. Give
it prompt and response laid end to end, EOS included where the response has one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl.convert.companions import copy_companions, write_config
from megatron_irl.convert.export import export_rows
from megatron_irl.convert.families import HEAD, HfTensor, Row, rows
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.hf_folder import HfWeights
from megatron_irl.convert.load import REWARD_HEAD, global_parameters
from megatron_irl.convert.tensors import Replicated
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.parallel.topology import Topology

SCORE = "score.weight"
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


class _Score(HfTensor):
    """The head's tensor, [1, H]."""

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        return (1, arch.dims["hidden"])


_ROW = Row(f"{REWARD_HEAD}.weight", Replicated(), (_Score(SCORE, ()),))


def export_hf_reward(
    chunks: Sequence[nn.Module],
    head_weight: Tensor | None,
    arch: Architecture,
    hf_config: dict[str, Any],
    out_dir: Path,
    *,
    source_dir: Path,
    topology: Topology,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer_path: Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Write backbone and reward head as ``<Family>ForSequenceClassification`` with one label.

    The language-model head stays out. ``score.weight`` is float32 whatever ``dtype``; a reader
    that loads the folder in half precision rounds it, and its scores.

    The score is read at the last token that is not padding, and a response ends with EOS, so
    padding must be another token: where the tokenizer pads with EOS, the folder's tokenizer and
    config name a different special token. If it has none, no padding token is set, and
    transformers takes one sequence at a time.

    Args:
        chunks, arch, hf_config, out_dir, source_dir, topology, dtype, max_shard_bytes,
            tokenizer_path, chat_template: As of ``export_hf``.
        head_weight: [1, H] on the last pipeline stage, equal on its ranks; None elsewhere.

    Collectives: every rank must call.

    Raises:
        UserError: The last stage has no head; else as ``export_hf``.
    """
    mine = dict(global_parameters(chunks))
    written = dtype or next(iter(mine.values())).dtype
    if topology.is_last_stage:
        if head_weight is None:
            raise UserError(f"{out_dir} cannot be written: the run has no reward head. Only "
                            "algorithm.name=rft learns one.")
        assert tuple(head_weight.shape) == _ROW.hf[0].shape(arch), tuple(head_weight.shape)
        mine[_ROW.megatron] = head_weight

    def complete(folder: Path) -> None:
        copy_companions(folder, Path(source_dir), tokenizer_path, chat_template)
        config = reward_config(hf_config) | {"pad_token_id": _set_padding(folder, arch.vocab_size)}
        write_config(folder, config, written)

    table = [(row, dtype) for row in rows(arch) if row.megatron != HEAD]
    export_rows(
        [*table, (_ROW, torch.float32)], mine, arch, out_dir, complete,
        source_dir=source_dir, topology=topology, max_shard_bytes=max_shard_bytes,
    )


def reward_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The config of a language model as that of a reward model on its backbone."""
    family = hf_config["architectures"][0]
    return hf_config | {
        "architectures": [family.removesuffix(CAUSAL) + CLASSIFIER],
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
