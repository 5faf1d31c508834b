"""Microbatches that a GPU is better filled by: what a recipe gives away when the host is slower."""

from dataclasses import replace

from megatron_irl.algorithms.base import algorithm_of
from megatron_irl.planning.machines import NEAR
from megatron_irl.planning.plan import Plan, make_plan, stage_parameters
from megatron_irl.planning.search import Found

_TIMES = (2, 4, 8, 16)  # as many tokens as a microbatch has now
_WORTH = 0.9  # of the time that a round takes now: more is not worth a word
_BETTER = 0.97  # of the time with smaller microbatches: more is not worth their memory


def fuller_microbatches(plan: Plan) -> Found | None:
    """The ``train.micro_batch_tokens`` with which rounds are a tenth faster, if there is one.

    Only such that fit whatever is drawn, or whatever the recipe would draw if that is all it does
    now. The gradient is the same, so nothing but time is asked for.
    """
    setup, recipe = plan.setup, plan.setup.recipe
    packs = [pack.sum for phase in plan.work.phases for pack in phase.packs]
    if not packs:
        return None
    parameters, best = stage_parameters(setup, algorithm_of(recipe)), plan
    for times in _TIMES:
        tokens = -(-times * sum(packs) // len(packs) // 100) * 100  # hundreds, rounded up
        train = replace(recipe.train, micro_batch_size=1, micro_batch_tokens=tokens)
        candidate = make_plan(
            replace(recipe, train=train), setup.arch, setup.machine, plan.work.lengths,
            data_parallel_size=setup.dp, parameters=parameters,
        )
        stages = candidate.worst if plan.always_fits else candidate.stages
        if max(stage.needed for stage in stages) > NEAR * setup.machine.memory:
            break
        if candidate.time.total < _BETTER * best.time.total:
            best = candidate
    if best.time.total > _WORTH * plan.time.total:
        return None
    train = best.setup.recipe.train
    said = [f"train.micro_batch_tokens={train.micro_batch_tokens}"]
    if recipe.train.micro_batch_size != 1:
        said.insert(0, "train.micro_batch_size=1")
    return Found(tuple(said), best)
