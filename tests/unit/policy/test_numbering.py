"""What a sample's randomness depends on: seed, round, stream, prompt and number; nothing else."""

from types import SimpleNamespace

from megatron_irl.generation.interface import request_key
from megatron_irl.policy.pairs import _number_samples, round_seed


def part(*ordinals):
    return [SimpleNamespace(ordinal=ordinal) for ordinal in ordinals]


def test_the_cut_into_parts_changes_no_key():
    whole = _number_samples([part(4, 4, 7, 7, 1, 1)])[0]
    cut = _number_samples([part(4, 4), part(7, 7, 1, 1)])
    assert [*cut[0], *cut[1]] == whole
    assert whole == [request_key(o, s) for o in (4, 7, 1) for s in (0, 1)]


def test_a_prompt_that_a_round_holds_twice_draws_anew():
    first, second = _number_samples([part(4, 7), part(4)])
    assert second == [request_key(4, 1)] and second[0] not in first


def test_seeds_are_stable_and_distinct():
    seeds = {round_seed(s, r, t) for s in range(4) for r in range(8) for t in (0, 1 << 20)}
    assert len(seeds) == 64 and max(seeds) < 2**64
    assert round_seed(1234, 0, 0) == 13485599891218298338  # recorded: resuming relies on it
