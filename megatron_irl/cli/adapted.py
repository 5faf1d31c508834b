"""The newest checkpoint of a run with adapters, opened for inference: merged into plain weights."""

from pathlib import Path

from megatron_irl.adapters.adapters import add_adapters, remove_adapters
from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.config import ParallelConfig, Recipe
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.provenance import check_weights
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
    base = Path(recipe.model.hf)
    check_weights(run, base)
    policy.load_weights(base)
    spec = adapter_spec(recipe.adapter, policy.architecture, parallel, seed=recipe.seed)
    assert spec is not None, "a recipe without adapters"
    adapters = add_adapters(policy.chunks, spec, policy.architecture, policy.topology)
    state = RunState.from_dict(checkpointer.load(step, policy.chunks))
    if recipe.adapter.merge_each_round:
        merge_earlier(adapters, RunFolder(run), state)
    adapters.merge_for_good()
    remove_adapters(adapters)
