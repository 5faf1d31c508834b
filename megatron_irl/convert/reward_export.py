"""The learned reward → a Hugging Face sequence-classification folder with one label.

``AutoModelForSequenceClassification`` reads its score at the last token that is not padding. Give
it prompt and response laid end to end, EOS included where the response has one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl.convert.companions import copy_companions, write_stop_ids
from megatron_irl.convert.export import export_rows
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.load import global_parameters
from megatron_irl.convert.reward_folder import complete_reward_folder
from megatron_irl.errors import UserError
from megatron_irl.families.table import REWARD_ROW, cast_to, rows
from megatron_irl.parallel.topology import Topology


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
    stop_ids: Sequence[int] = (),
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
            tokenizer_path, chat_template, stop_ids: As of ``export_hf``.
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
        assert tuple(head_weight.shape) == REWARD_ROW.shape(arch), tuple(head_weight.shape)
        mine[REWARD_ROW.megatron] = head_weight

    def complete(folder: Path) -> None:
        copy_companions(folder, Path(source_dir), tokenizer_path, chat_template)
        write_stop_ids(folder, hf_config, stop_ids)
        complete_reward_folder(folder, hf_config, arch, written)

    reward = dataclasses.replace(arch, reward=True)
    export_rows(
        [(row, cast_to(row, dtype) if dtype else None) for row in rows(reward)],
        mine, reward, out_dir, complete,
        source_dir=source_dir, topology=topology, max_shard_bytes=max_shard_bytes,
    )
