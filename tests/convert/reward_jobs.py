"""What the ranks of a reward export test run; importable by name."""

from pathlib import Path
from typing import Any

import torch

from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.reward_export import export_hf_reward
from megatron_irl.errors import UserError
from tests.dist.jobs import Layout, build


def export(hf: str, layout: Layout, head: list[float] | None, out: str, **options: Any) -> str:
    """Export the folder's backbone with a head; returns the message if it is refused."""
    topology, chunks, _, _ = build(hf, layout)
    config = read_hf_config(Path(hf))
    weight = None
    if head is not None and topology.is_last_stage:
        weight = torch.tensor([head])
    try:
        export_hf_reward(chunks, weight, architecture(config), config, Path(out),
                         source_dir=Path(hf), topology=topology, **options)
    except UserError as error:
        return str(error)
    return ""
