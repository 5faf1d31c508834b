"""What the ranks of a conversion test run; importable by name."""

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any

import torch

import megatron_irl.hardware  # noqa: F401
from megatron_irl.convert.export import export_hf
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.convert.megatron_folder import load_megatron, sharded_weights
from megatron_irl.errors import UserError
from megatron_irl.policy.policy import Policy
from megatron_irl.storage.checkpoint import Checkpointer
from tests.dist.jobs import (
    Layout,
    build,
    build_trainer,
    make_pairs,
    multiple_of,
    objective,
    random_sequences,
)

from megatron.core import dist_checkpointing  # isort: skip


def round_trip(hf: str, layout: Layout, out: str, **options: Any) -> None:
    """Load a folder under a layout and write it out again."""
    topology, chunks, _, _ = build(hf, layout)
    source = Path(hf)
    config = read_hf_config(source)
    export_hf(
        chunks, architecture(config), config, Path(out), source_dir=source, topology=topology,
        **options,
    )


def full_disk(hf: str, out: str) -> str:
    """Export while every shard write fails as on a full disk; returns the message."""
    from megatron_irl.convert import export

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    original, export.ShardedWriter.add = export.ShardedWriter.add, refuse
    try:
        round_trip(hf, {}, out)
    except UserError as error:
        return str(error)
    finally:
        export.ShardedWriter.add = original
    return "no error"


def load_message(hf: str, good: str) -> str:
    """What loading ``hf`` into a model built from ``good`` says."""
    _, chunks, _, _ = build(good, {})
    before = [p.detach().clone() for p in chunks[0].parameters()]
    try:
        arch = architecture(read_hf_config(Path(hf)))
        load_hf_weights(chunks, arch, Path(hf), tp_rank=0, tp_size=1)
    except UserError as error:
        return str(error)
    unchanged = all(map(torch.equal, before, chunks[0].parameters()))
    return f"no error, unchanged={unchanged}"


def tool(path: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a tool's main()."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = runpy.run_path(path)["main"](arguments)
    return code, errors.getvalue()


def save_checkpoint(hf: str, layout: Layout, out: str, **metadata: Any) -> None:
    """Save a folder's weights as Megatron itself does under a layout.

    Args:
        metadata: Of how Megatron lays out what it saves.
    """
    topology, chunks, _, _ = build(hf, layout)
    Path(out).mkdir(parents=True, exist_ok=True)
    topology.barrier()
    dist_checkpointing.save(sharded_weights(chunks, topology, **metadata), out)


def save_training(hf: str, layout: Layout, folder: str, export: str) -> None:
    """A checkpoint as a run leaves one, after an optimizer step, and the same weights as HF."""
    from megatron_irl.train.batches import microbatches_for

    stepper = build_trainer(hf, layout, {"lr": 1e-2})
    topology = stepper.policy.topology
    batches = microbatches_for(
        make_pairs(3, 8, 128), topology, micro_batch_size=2, multiple_of=multiple_of(layout)
    )
    stepper.train_step(batches, objective)
    Path(folder).mkdir(parents=True, exist_ok=True)
    topology.barrier()
    scheduler = Scheduler()
    Checkpointer(Path(folder), topology, keep=1).save(
        1, stepper.policy.chunks, stepper.optimizer, scheduler, {"step": 1}
    )
    config = read_hf_config(Path(hf))
    export_hf(
        stepper.policy.chunks, architecture(config), config, Path(export), source_dir=Path(hf),
        topology=topology,
    )


class Scheduler:
    """The learning-rate schedule's part in a checkpoint."""

    def state_dict(self) -> dict[str, int]:
        return {"num_steps": 1}


def load_equals(hf: str, layout: Layout, checkpoint: str) -> list[str]:
    """Parameters that a checkpoint fills differently from the HF folder under a layout."""
    topology, chunks, _, arch = build(hf, layout)
    expected = [{n: p.detach().clone() for n, p in c.named_parameters()} for c in chunks]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_megatron(chunks, arch, Path(checkpoint), topology)
    return [
        name for chunk, before in zip(chunks, expected, strict=True)
        for name, parameter in chunk.named_parameters() if not torch.equal(parameter, before[name])
    ]


def checkpoint_logprobs(
    hf: str, layout: Layout, checkpoint: str, seed: int, num: int, vocab: int
) -> list[list[float]]:
    """Response log-probabilities under a checkpoint's weights."""
    topology, chunks, _, arch = build(hf, layout)
    load_megatron(chunks, arch, Path(checkpoint), topology)
    scores = Policy(chunks, topology, arch).score(random_sequences(seed, num, vocab))
    return [score.tolist() for score in scores]


def load_megatron_message(hf: str, checkpoint: str) -> str:
    """What loading a checkpoint into a model of ``hf`` says."""
    topology, chunks, _, arch = build(hf, {})
    try:
        load_megatron(chunks, arch, Path(checkpoint), topology)
    except UserError as error:
        return str(error)
    return "no error"


class NormWithExtraState(torch.nn.RMSNorm):
    """A local norm with extra state in the checkpoint, as every layer of Transformer Engine has."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([7.0])

    def set_extra_state(self, state: Any) -> None:
        self.restored = state


def resume_across_specs(
    hf: str, folder: str, *, extra_when_saving: bool
) -> tuple[list[str], bool]:
    """Save with (or without) extra state, resume without (or with) it.

    Returns:
        Parameters that differ, and whether extra state was restored.
    """
    topology, chunks, _, _ = build(hf, {})
    checkpointer = Checkpointer(Path(folder), topology, keep=1)
    norm: Any = chunks[0].decoder.final_layernorm
    plain = type(norm)
    norm.__class__ = NormWithExtraState if extra_when_saving else plain
    sharded = checkpointer._sharded(chunks, None, is_loading=False)
    path = checkpointer.path(1)
    path.mkdir(parents=True)
    dist_checkpointing.save(sharded | {"format_version": 1, "state": {}}, str(path))
    norm.__class__ = plain if extra_when_saving else NormWithExtraState
    before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    for parameter in chunks[0].parameters():
        parameter.data.zero_()
    checkpointer.load(1, chunks)
    differing = [n for n, p in chunks[0].named_parameters() if not torch.equal(p, before[n])]
    return differing, hasattr(norm, "restored")
