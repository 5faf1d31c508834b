"""A checkpoint's optimizer is one, in however many parts Megatron has it.

Experts that some ranks have to themselves are reduced over other groups than the rest, and
Megatron gives them an optimizer of their own. It stores the parts one by one, so that what one
layout has saved another cannot load that has more of them, or fewer. Here the state of every
parameter is stored by its name alone (``optimizer_blocks``), and the settings of the groups
together; a part takes what is its own.

To be removed when Megatron's checkpoint of an optimizer does not depend on how many parts it has.
"""

from typing import Any

from megatron_irl.errors import UserError

OPTIMIZER, GROUPS, STATE, EXPERT = "optimizer", "param_groups", "param_state", "is_expert_parallel"


def as_one(state: dict[Any, Any]) -> dict[Any, Any]:
    """What ``sharded_state_dict`` of an optimizer in parts gives, as of one that has them all.

    That of an optimizer in one part, or of parts that do not store parameters by name (those that
    are not distributed), is returned as it is.
    """
    parts = list(state.values())
    if not all(isinstance(key, int) for key in state) or any(STATE not in p for p in parts):
        return state
    groups = [group for part in parts for group in part[OPTIMIZER][GROUPS]]
    rest = {key: value for key, value in parts[0].items() if key not in (OPTIMIZER, STATE)}
    return rest | {
        OPTIMIZER: parts[0][OPTIMIZER] | {GROUPS: groups},
        STATE: {f"part{number}": part[STATE] for number, part in enumerate(parts)},
    }


def as_parts(loaded: dict[Any, Any], optimizer: Any) -> dict[Any, Any]:
    """What was loaded as ``as_one`` asked, for ``load_state_dict`` of the optimizer.

    Raises:
        UserError: The checkpoint has other parts than the optimizer, and they are not stored by
            name.
    """
    count = len(getattr(optimizer, "chained_optimizers", [optimizer]))
    if apart := [key for key in loaded if isinstance(key, int)]:
        if len(apart) == len(loaded) == count:
            return loaded
        raise UserError(
            f"the optimizer is in {count} part(s) under this layout, and in another number of them "
            "in the checkpoint. Only a distributed optimizer (adam, lion) goes on under another "
            "parallel.expert_model_parallel_size; set it as it was."
        )
    if STATE not in loaded:  # not a distributed one
        return loaded
    groups = loaded[OPTIMIZER][GROUPS]
    # A group that the layout of then had not is a twin of one that it had.
    twins = [group | {EXPERT: not group.get(EXPERT)} for group in groups]
    whole = loaded | {OPTIMIZER: loaded[OPTIMIZER] | {GROUPS: [*twins, *groups]}}
    if count == 1:
        return whole
    return {
        number: whole | {STATE: loaded[STATE][f"part{number}"]} for number in range(count)
    }

