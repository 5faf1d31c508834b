"""How sequences are split into packs for evaluation, and that packs are made one call at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_irl.data.packing import pack
from megatron_irl.parallel.heartbeat import Heartbeat
from megatron_irl.policy import scoring
from megatron_irl.policy.score_packs import token_budget_split
from megatron_irl.policy.scoring import score_in_packs


def sequences_of(*lengths: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(one prompt token, the rest response) of the lengths; every token is the position."""
    return [(np.full(1, i, np.int32), np.full(n - 1, i, np.int32)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("lengths", "expected"), [
    ((), []),
    ((2, 9, 3, 3, 2), [[1], [2, 3, 0], [4]]),  # 9 is over the budget; equal lengths keep order
    ((4, 4, 4), [[0, 1], [2]]),
    ((8, 8), [[0], [1]]),
])
def test_longest_first_up_to_the_budget(lengths, expected):
    split = token_budget_split(sequences_of(*lengths), max_tokens=8)
    assert all(len(group) == 1 for groups in split for group in groups)
    assert [[i for group in groups for i in group] for groups in split] == expected


def test_neighbours_with_one_prompt_are_one_group_as_far_as_it_fits():
    """Prompts of 3 tokens, a limit of 8: with responses of 2, 2 and 2 the third begins anew."""
    def prompt(n):
        return np.full(3, n, np.int32)  # equal, and another object each time

    responses = [np.ones(2, np.int32)] * 6
    sequences = list(zip(map(prompt, [1, 1, 1, 2, 1, 1]), responses, strict=True))
    split = token_budget_split(sequences, max_tokens=8)
    assert split == [[range(0, 2)], [range(4, 6)], [range(2, 3)], [range(3, 4)]]
    apart = token_budget_split(sequences, max_tokens=8, share_prompts=False)
    assert apart == [[range(i, i + 1)] for i in range(6)]
    # Responses of one token and a prompt of ten: attention's places, eleven each, are the limit.
    long = [(np.full(10, 7, np.int32), np.ones(1, np.int32))] * 9
    assert token_budget_split(long, max_tokens=20) == [
        [range(0, 3)], [range(3, 6)], [range(6, 9)]]
    longer = [(prompt(1), np.ones(20, np.int32)), (prompt(1), np.ones(1, np.int32))]
    assert token_budget_split(longer, max_tokens=8) == [[range(0, 1)], [range(1, 2)]]


@pytest.mark.parametrize(("rank", "dp_size"), [(0, 1), (0, 3), (2, 3), (50, 64)])
def test_only_the_own_share_is_packed_a_call_at_a_time(monkeypatch, rank, dp_size):
    """40 packs of two: of a rank's share no more than the eight of a call are made ahead."""
    packed: list[list[int]] = []

    def counted(items, *args, **kwargs):
        packed.append([int(response[0]) for _, response in items])
        return pack(items, *args, **kwargs)

    calls: list[tuple[int, int]] = []  # (packs of a call, packs made by then)

    def token_logprobs(batches):
        calls.append((len(batches), len(packed)))
        return [[ids.float() for ids in batch.targets_R.split(batch.lengths_S.tolist())]
                for batch in batches]

    others = {i: np.zeros(3, np.float32) for i in range(80)}
    monkeypatch.setattr(scoring, "pack", counted)
    monkeypatch.setattr(scoring, "from_last_stage", lambda value, topology: value)
    monkeypatch.setattr(
        scoring, "gather_over_data_parallel", lambda value, topology: [others, value])
    topology = SimpleNamespace(
        dp_rank=rank, dp_size=dp_size, pp_size=1, heart=Heartbeat()
    )
    scores = score_in_packs(
        token_logprobs, sequences_of(*[4] * 80), topology, max_tokens=8, multiple_of=1
    )

    mine = list(range(rank, 40, dp_size)) or [39]  # without a pack of its own: the last one
    assert packed == [[2 * i, 2 * i + 1] for i in mine]
    assert calls == [
        (min(8, len(mine) - n), min(n + 8, len(mine))) for n in range(0, len(mine), 8)
    ]
    assert [list(score) for score in scores] == [
        [i if i // 2 in mine else 0] * 3 for i in range(80)
    ]
