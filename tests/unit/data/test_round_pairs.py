"""The pairs of a round by their numbers alone, and the few that a rank reads."""

import numpy as np
import pytest

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_index import counts, index_of
from megatron_irl.data.round_pairs import PairRows, RoundPairs
from megatron_irl.data.stored import Stored
from megatron_irl.train.batches import num_tokens
from tests.unit.data.pairs import assert_same, make_pairs


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """Rounds 0 and 1 of 12 pairs each in parts of 3; ``bank.reads`` grows with every part read."""
    bank, original = PairBank(tmp_path), PairBank.read_part
    for round in (0, 1):
        pairs = make_pairs(12, seed=round, round=round, references=True)
        for part in range(4):
            bank.write_part(round, part, pairs[3 * part : 3 * part + 3])
        bank.finish_round(round)
    bank.reads = []

    def spy(self, round, part):
        bank.reads.append((round, part))
        return original(self, round, part)

    monkeypatch.setattr(PairBank, "read_part", spy)
    return bank


def opened(bank, round) -> RoundPairs:
    pairs = RoundPairs(bank, round, bank.parts(round))
    pairs.index = np.concatenate([index_of(pairs.part(n), n) for n in pairs.parts])
    pairs.release()
    bank.reads.clear()
    return pairs


def test_rows_are_the_bank_s_pairs_and_their_sizes_are_known(bank):
    expected = [*bank.read_round(0), *bank.read_round(1)]
    rows = opened(bank, 0).rows() + opened(bank, 1).rows()
    assert isinstance(rows, Stored)
    for share in (True, False):
        counts = [num_tokens(pair, share_prompts=share) for pair in expected]
        assert rows.token_counts(share_prompts=share) == counts
        chosen = rows.chosen([20, 3]).token_counts(share_prompts=share)
        assert chosen == [counts[20], counts[3]]
    assert bank.reads == [], "a size needs no pair"
    assert_same([rows[i] for i in (0, 11, 12, 23)], [expected[i] for i in (0, 11, 12, 23)])
    assert_same(list(rows.chosen([7, 7, 1])), [expected[i] for i in (7, 7, 1)])
    assert_same(list(rows[10:14]), expected[10:14])


def test_what_is_kept_is_read_once_and_the_rest_let_go(bank):
    expected = [*bank.read_round(0), *bank.read_round(1)]
    rows: PairRows = opened(bank, 0).rows() + opened(bank, 1).rows()
    rows.keep([1, 2, 13, 22])
    assert bank.reads == [(0, 0), (1, 0), (1, 3)]
    assert_same([rows.chosen([22, 1])[i] for i in (0, 1)], [expected[22], expected[1]])
    rows.keep([2, 5])  # 2 is there
    assert bank.reads == [(0, 0), (1, 0), (1, 3), (0, 1)]
    assert_same([rows[2], rows[5]], [expected[2], expected[5]])
    assert len(bank.reads) == 4
    assert rows[22].ordinal == expected[22].ordinal and bank.reads[-1] == (1, 3), "it was let go"


def test_parts_in_memory_are_not_read_again(bank):
    pairs = opened(bank, 0)
    own = pairs.part(1)
    rows = pairs.rows()
    rows.keep([3, 4, 9])
    assert bank.reads == [(0, 1), (0, 3)]
    assert rows[3] is own[0]
    pairs.release(but=[1])
    assert pairs.part(1) is own


def test_the_index_of_values_not_computed_yet():
    pairs = make_pairs(4)
    index = index_of(pairs, 5)
    assert np.isnan(index["ref_demo_logp"]).all() and np.isnan(index["reward_sample"]).all()
    assert index["part"].tolist() == [5] * 4 and index["row"].tolist() == [0, 1, 2, 3]
    assert index["stopped"].tolist() == [True, False] * 2
    assert index["sample_logp"].tolist() == [p.sample_logprobs.sum(dtype=np.float64) for p in pairs]
    assert counts(index_of([])["kind"]) == {"duplicates": 0, "empty": 0, "usable": 0}
