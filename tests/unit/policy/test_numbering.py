"""What a sample's randomness depends on: seed, round, stream, prompt and number; nothing else."""

from types import SimpleNamespace

from megatron_irl.generation.interface import request_key
from megatron_irl.policy.pairs import Parts, round_seed


def parts(ordinals, bounds, samples):
    return Parts([SimpleNamespace(ordinal=ordinal) for ordinal in ordinals], bounds, samples)


def test_the_cut_into_parts_changes_no_key():
    (whole,) = parts((4, 7, 1), [(0, 3)], 2).keys()
    made = parts((4, 7, 1), [(0, 1), (1, 3)], 2)
    cut = made.keys()
    assert [[d.ordinal for d in part] for part in made] == [[4, 4], [7, 7, 1, 1]]
    assert [*cut[0], *cut[1]] == whole
    assert whole == [request_key(o, s) for o in (4, 7, 1) for s in (0, 1)]


def test_a_prompt_that_a_round_holds_twice_draws_anew():
    first, second = parts((4, 7, 4), [(0, 2), (2, 3)], 1).keys()
    assert second == [request_key(4, 1)] and second[0] not in first


def test_seeds_are_stable_and_distinct():
    seeds = {round_seed(s, r, t) for s in range(4) for r in range(8) for t in (0, 1 << 20)}
    assert len(seeds) == 64 and max(seeds) < 2**64
    assert round_seed(1234, 0, 0) == 13485599891218298338  # recorded: resuming relies on it
