"""A checkpoint of a run with adapters: opened for inference, or written as ordinary folders."""

import tempfile
from pathlib import Path

import torch

from megatron_irl import hardware  # noqa: F401  (must precede megatron)
from megatron_irl.adapters.adapters import Adapters, add_adapters, remove_adapters
from megatron_irl.adapters.export import export_adapter, join_adapters
from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.config import ParallelConfig, Recipe, load_recipe
from megatron_irl.config.run_files import RECIPE
from megatron_irl.convert.export import export_hf
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.weights_digest import weights_digest
from megatron_irl.errors import UserError
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import initialize, shutdown
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.provenance import check_weights, start_of
from megatron_irl.run.adapter_rounds import merge_earlier
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.state import RunState
from megatron_irl.storage.checkpoint import Checkpointer


def load_adapted(
    policy: Policy, run: Path, recipe: Recipe, parallel: ParallelConfig, checkpointer: Checkpointer,
    step: int,
) -> None:
    """Fill a policy of bare chunks from its base and a checkpoint's adapters.

    Raises:
        UserError: The base is not what the run began with, or something cannot be read.

    Collectives: every rank must call.
    """
    adapters = _read(policy, run, recipe, parallel, checkpointer, step)
    adapters.merge_for_good()
    remove_adapters(adapters)


def convert_adapted(
    checkpoint: Path, out: Path, *, dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a run's checkpoint as the merged model, with the adapter in ``adapter/`` inside.

    In one process, which holds the whole model.

    Raises:
        UserError: There is no run around the checkpoint, its base is another one, ``out`` exists,
            or something cannot be read or written.
    """
    run = checkpoint.resolve().parents[1]
    if not (run / RECIPE).is_file():
        raise UserError(
            f"the checkpoint {checkpoint} holds adapters, and not the model below them; its run's "
            f"{RECIPE}, which names that, is not in {run}. Give it where the run left it."
        )
    if out.exists():
        raise UserError(f"--out {out} exists. Remove it, or give another folder.")
    recipe = load_recipe(run / RECIPE, check_files=False)
    base, parallel = Path(recipe.model.hf), ParallelConfig()
    hf_config = read_hf_config(base)
    arch = architecture(hf_config)
    config = build_config(
        arch, parallel, precision="bf16" if recipe.precision == "fp8" else recipe.precision,
        overrides={k: v for k, v in recipe.model.overrides.items() if not k.startswith("fp8")},
    )
    topology = initialize(parallel)
    try:
        policy = Policy(build_chunks(config, arch, topology), topology, arch)
        checkpointer = Checkpointer(checkpoint.resolve().parent, topology, keep=1)
        step = int(checkpoint.name.removeprefix("step_"))
        adapters = _read(policy, run, recipe, parallel, checkpointer, step)
        with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}.") as place:
            _export_whole(adapters, run, base, Path(place) / "adapter")
            adapters.merge_for_good()
            remove_adapters(adapters)
            tokenizer = recipe.data.tokenizer
            export_hf(
                policy.chunks, arch, hf_config, Path(place) / "hf", source_dir=base,
                topology=topology, dtype=dtype, max_shard_bytes=max_shard_bytes,
                tokenizer_path=Path(tokenizer) if tokenizer else None,
            )
            (Path(place) / "adapter").rename(Path(place) / "hf" / "adapter")
            (Path(place) / "hf").rename(out)
    finally:
        shutdown()


def _read(
    policy: Policy, run: Path, recipe: Recipe, parallel: ParallelConfig, checkpointer: Checkpointer,
    step: int,
) -> Adapters:
    """The base with what earlier rounds merged, and above it the checkpoint's adapters."""
    base = Path(recipe.model.hf)
    check_weights(run, base)
    policy.load_weights(base)
    spec = adapter_spec(recipe.adapter, policy.architecture, parallel, seed=recipe.seed)
    assert spec is not None, "a recipe without adapters"
    adapters = add_adapters(policy.chunks, spec, policy.architecture, policy.topology)
    state = RunState.from_dict(checkpointer.load(step, policy.chunks))
    if recipe.adapter.merge_each_round:
        merge_earlier(adapters, RunFolder(run), state)
    return adapters


def _export_whole(adapters: Adapters, run: Path, base: Path, out: Path) -> None:
    """All that the run has learnt as one adapter of the model that it began with."""
    digest, folder = start_of(run).get("model.hf") or weights_digest(base), RunFolder(run)
    if not adapters.rounds_merged:
        export_adapter(adapters, out, base=base, digest=digest)
        return
    last = out.with_name("last")
    export_adapter(adapters, last, base=base, digest=digest)
    earlier = [folder.round_adapter(index) for index in range(adapters.rounds_merged)]
    join_adapters([*earlier, last], out, base=base, digest=digest)
