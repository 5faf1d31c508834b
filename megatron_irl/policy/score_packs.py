"""Which sequences are scored together: positions in a list, packed when their turn comes."""

import numpy as np

Sequences = list[tuple[np.ndarray, np.ndarray]]
"""(prompt ids, response ids), int32."""


def token_budget_split(
    sequences: Sequences, *, max_tokens: int, share_prompts: bool = True
) -> list[list[range]]:
    """Split sequences for evaluation, longest first, up to ``max_tokens`` together.

    Only positions: there may be millions of sequences, of which a rank packs its own and those
    only when their turn comes. A longer sequence is alone.

    Returns:
        Packs of groups of neighbours, each with one prompt; single sequences if not to be shared.
        A pack's tokens are at most ``max_tokens``, and their places in attention twice as many.
    """
    groups, lengths = prompt_groups(
        sequences, max_tokens=max_tokens, share_prompts=share_prompts)
    split: list[list[range]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not split or tokens + lengths[index] > max_tokens:
            split.append([])
            tokens = 0
        split[-1].append(groups[index])
        tokens += lengths[index]
    return split


def prompt_groups(
    sequences: Sequences, *, max_tokens: int, share_prompts: bool
) -> tuple[list[range], list[int]]:
    """Neighbours with one prompt, and how much each group counts in a pack (``pack_weight``).

    Args:
        max_tokens: What a group of more than one sequence counts at most.
        share_prompts: Without it every sequence is a group.
    """
    groups: list[range] = []
    weights: list[int] = []
    known: np.ndarray | None = None
    tokens = places = 0  # of the newest group
    for index, (prompt, response) in enumerate(sequences):
        more, whole = len(response), len(prompt) + len(response)
        joins = (
            share_prompts and known is not None
            and pack_weight(tokens + more, places + whole) <= max_tokens
            and (prompt is known or np.array_equal(prompt, known))
        )
        if joins:
            groups[-1] = range(groups[-1].start, index + 1)
            tokens, places = tokens + more, places + whole
            weights[-1] = pack_weight(tokens, places)
        else:
            groups.append(range(index, index + 1))
            tokens = places = whole
            weights.append(whole)
        known = prompt
    return groups, weights


def pack_weight(tokens: int, places: int) -> int:
    """Tokens that sequences count for in a pack: as they are, or half of attention's places.

    A long prompt with many short responses is few tokens and many places, whose queries, keys and
    values take memory too.
    """
    return max(tokens, -(-places // 2))
