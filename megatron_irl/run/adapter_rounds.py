"""Adapters over the rounds of a run: merged at a round's start, merged again when it resumes."""

from pathlib import Path
from typing import Any

from megatron_irl.adapters.adapters import Adapters
from megatron_irl.adapters.export import export_adapter, join_adapters
from megatron_irl.compat.narrow_optimizer import reload_main_params
from megatron_irl.convert.peft_folder import PeftFolder
from megatron_irl.errors import UserError
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.policy.policy import Policy
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.inputs import Inputs
from megatron_irl.run.run import BASE, Run
from megatron_irl.run.state import RunState


def merge_round(run: Run) -> None:
    """At the start of a round but the first: merge what the last one learnt, if the recipe asks.

    The adapters are written before they are merged: a checkpoint holds those of its own round only,
    and a run that resumes merges the others again, in the same order to the same bits.

    Collectives: every rank must call.
    """
    adapters, state = run.policy.adapters, run.state
    if adapters is None or not run.recipe.adapter.merge_each_round:
        return
    run.policy.complete_gather()
    _write(run, run.folder.round_adapter(state.round - 1))
    adapters.merge_and_begin(state.round)
    # Its fp32 main parameters are copies of the bf16 ones, which have begun anew.
    reload_main_params(run.trainer.optimizer)


def restore_base(
    inputs: Inputs, policy: Policy, state: RunState, saved: dict[str, Any]
) -> None:
    """Merge into a resumed run's base what earlier rounds learnt. Collective.

    Args:
        saved: What the checkpoint kept besides tensors.

    Raises:
        UserError: The base is another one; the adapter of a round is gone or damaged.
    """
    adapters, digest = policy.adapters, inputs.start["model.hf"]
    if adapters is None:
        return
    if saved.get(BASE, digest) != digest:
        raise UserError(
            f"the newest checkpoint of {inputs.folder.path} is of adapters of another base: its "
            f"digest was {saved[BASE]} and that of model.hf={inputs.recipe.model.hf} is {digest}. "
            "Put the files of the base back."
        )
    if inputs.recipe.adapter.merge_each_round:
        merge_earlier(adapters, inputs.folder, state)


def merge_earlier(adapters: Adapters, folder: RunFolder, state: RunState) -> None:
    """Merge what rounds learnt before the one in which a checkpoint was saved. Collective.

    The last one is still in the checkpoint's adapters where it stands at the start of a round.
    """
    merged = state.round if state.step_in_round else state.round - 1

    def merge() -> None:
        with adapters.set_aside():
            for index in range(merged):
                adapters.read(PeftFolder.read(folder.round_adapter(index)))
                adapters.merge_for_good()

    # Every rank reads whole adapters and takes its share: they are small, and nothing is sent.
    everywhere(merge, adapters.topology)


def write_adapter(run: Run) -> None:
    """Leave the adapter as a product of the run: what it adds to the model it began with.

    Merged rounds and the last one become one adapter, of the sum of their ranks. Collective.
    """
    folder, adapters = run.folder, run.policy.adapters
    assert adapters is not None
    if adapters.rounds_merged == 0:
        _write(run, folder.adapter)
        return
    last = adapters.rounds_merged
    _write(run, folder.round_adapter(last))
    parts = [folder.round_adapter(index) for index in range(last + 1)]
    base = Path(run.recipe.model.hf)

    def join() -> None:
        join_adapters(parts, folder.adapter, base=base, digest=folder.start["model.hf"])

    on_main(join, run.topology)


def _write(run: Run, path: Path) -> None:
    adapters = run.policy.adapters
    assert adapters is not None
    digest = on_main(lambda: run.folder.start["model.hf"], run.topology)
    export_adapter(adapters, path, base=Path(run.recipe.model.hf), digest=digest)
