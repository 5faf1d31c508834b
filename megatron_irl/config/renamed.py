"""Recipe keys that had another name in release 0.1.0: read as before, written as now.

*chunk* is Megatron's model chunk; what the bank commits at once is a part.
"""

from collections.abc import Mapping
from typing import Any

from megatron_irl.errors import UserError

NOW = {
    "generation.chunk_size": "generation.part_size",
    "train.logprob_chunk_size": "train.logprob_rows",
}
BEFORE = {now: before for before, now in NOW.items()}


def with_names_of_now(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's sections with today's names of their keys.

    Raises:
        UserError: A key is given under both names.
    """
    renamed = dict(mapping)
    for before, now in NOW.items():
        (section, old), (_, new) = before.split("."), now.split(".")
        keys = renamed.get(section)
        if not isinstance(keys, Mapping) or old not in keys:
            continue
        if new in keys:
            raise UserError(f"{before} and {now} are one key, whose name was the former once. "
                            f"Remove {before}.")
        renamed[section] = {new if key == old else key: value for key, value in keys.items()}
    return renamed
