"""What is left of a step whose loss or gradient was not finite, for whoever looks into it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.data.round_pairs import PairRows
from megatron_irl.errors import UserError
from megatron_irl.run.run import Run
from megatron_irl.storage.commit import write_file
from megatron_irl.train.finite import NotFinite


def write_post_mortem(run: Run, phase: str, bad: NotFinite) -> Path:
    """Leave ``nonfinite/step_NNNNNN/``: the batch, and what each rank of the last stage found.

    Every rank calls; no collective. What cannot be written is a warning.
    """
    state, topology = run.state, run.topology
    folder = run.folder.path / "nonfinite" / f"step_{state.step + 1:06d}"
    place = {"step": state.step + 1, "round": state.round, "phase": phase,
             "step_in_round": state.step_in_round, "lr": run.trainer.lr,
             "loss": str(bad.loss), "grad_norm": str(bad.grad_norm)}
    try:
        if topology.is_main:
            batches = [run.trainer.drawn(stream) for stream in bad.streams]
            # Of most pairs this rank knows numbers only, and reads them by whole parts.
            items = [item for batch in batches
                     for item in (batch.read() if isinstance(batch, PairRows) else batch)]
            _write(folder / "batch.json", place | {"items": [_plain(item) for item in items]})
        if bad.local_losses and topology.tp_rank == 0:
            _write(folder / f"rank_{topology.rank:05d}.json", {
                "rank": topology.rank, "data_parallel_rank": topology.dp_rank,
                "pipeline_rank": topology.pp_rank,
                "microbatch_losses": [str(loss) for loss in bad.local_losses],
            })
    except UserError as error:
        run.console.warn(f"the batch could not be kept: {error}")
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content).encode())


def _plain(item: Any) -> dict[str, Any]:
    """An item of a batch by its fields: ordinals, token ids, references, advantages."""
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    return {"kind": type(item).__name__} | {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }
