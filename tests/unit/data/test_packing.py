"""The counted token set, by hand and at random; balanced splits; alignment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_irl.data.balance import assign, assign_by_tokens
from megatron_irl.data.packing import alignment, lengthen, pack

EOS = 2


def test_hand_worked_example():
    """Two sequences and padding to 8.

    index     0  1  2  3 | 4  5  6 | 7
    token    10 11 20  2 | 12 21 2 | 0
    part      p  p  r  r | p  r  r | padding
    The row before each response token predicts it: 1->20, 2->EOS, 4->21, 5->EOS.
    """
    batch = pack([([10, 11], [20, EOS]), ([12], [21, EOS])], [-1.5, -2.5], multiple_of=8)
    assert batch.tokens_T.tolist() == [[10, 11, 20, 2, 12, 21, 2, 0]]
    assert batch.position_ids_T.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.max_seqlen == 4
    assert batch.rows_R.tolist() == [1, 2, 4, 5]
    assert batch.targets_R.tolist() == [20, 2, 21, 2]
    assert batch.segment_R.tolist() == [0, 0, 1, 1]
    assert batch.num_sequences == 2
    assert batch.lengths_S.tolist() == [2, 2]
    assert batch.ref_logps_S.tolist() == [-1.5, -2.5]
    assert batch.final_S.tolist() == [3, 6]  # where the reward is read: both at EOS
    assert batch.sampled_logprobs_R is None and batch.advantages_S is None


def test_shared_prompt_by_hand():
    """A prompt with two responses, another sequence, and padding to 8.

    index     0  1 | 2  3 | 4 | 5  6 | 7
    token    10 11 | 20 2 | 2 | 12 2 | 0
    part      p  p | first| 2nd| p r | padding
    Row 1 predicts the first token of both responses; the second one's stands at position 2 of its
    sequence. Attention sees [0 1 2 3], [0 1 4], [5 6], [7].
    """
    sequences = [([10, 11], [20, EOS]), ([10, 11], [EOS]), ([12], [EOS])]
    batch = pack(sequences, None, sharing=[2, 1], multiple_of=8)
    assert batch.tokens_T.tolist() == [[10, 11, 20, 2, 2, 12, 2, 0]]
    assert batch.position_ids_T.tolist() == [[0, 1, 2, 3, 2, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9, 10] and batch.max_seqlen == 4
    assert batch.rows_R.tolist() == [1, 2, 1, 5]
    assert batch.targets_R.tolist() == [20, 2, 2, 2]
    assert batch.segment_R.tolist() == [0, 0, 1, 2]
    assert batch.final_S.tolist() == [3, 4, 6]
    assert batch.shared.rows_A.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert batch.shared.first_T.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert batch.shared.again_B.tolist() == [4, 5]


@pytest.mark.parametrize(("sequences", "sharing"), [
    ([([1], [1])] * 3, [2]), ([([1], [1])] * 3, [3, 1]), ([([1], [1])] * 2, [2, 0]),
    ([([1], [1]), ([1, 1], [1])], [2]),
])
def test_groups_that_are_none_are_refused(sequences, sharing):
    with pytest.raises(ValueError, match="shar"):
        pack(sequences, None, sharing=sharing)


def test_dtypes_no_references_no_padding():
    batch = pack([(np.array([5], np.int32), np.array([6], np.int32))], None)
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.ref_logps_S.tolist() == [0.0]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.ref_logps_S.dtype == torch.float32
    for name in ("tokens_T", "position_ids_T", "rows_R", "targets_R", "segment_R", "lengths_S"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_padding_may_be_the_longest_segment():
    batch = pack([([1], [2])], None, multiple_of=16, pad_id=EOS)
    assert batch.tokens_T.tolist() == [[1, 2] + [EOS] * 14]
    assert batch.cu_seqlens.tolist() == [0, 2, 16] and batch.max_seqlen == 14
    assert batch.rows_R.tolist() == [0]


# Ids from {0, EOS} only: pad is EOS is an ordinary token, so masking by id would show.
ids = st.lists(st.sampled_from([0, EOS]), min_size=1, max_size=6)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5), st.sampled_from([1, 2, 8, 16]))
@settings(max_examples=100, deadline=None)
def test_invariants(sequences, multiple_of):
    batch = pack(sequences, None, multiple_of=multiple_of, pad_id=EOS)
    tokens, positions = batch.tokens_T[0].tolist(), batch.position_ids_T[0].tolist()
    bounds = batch.cu_seqlens.tolist()
    total = sum(len(p) + len(r) for p, r in sequences)
    assert len(tokens) == len(positions) == bounds[-1] == -(-total // multiple_of) * multiple_of
    assert len(bounds) == len(sequences) + 1 + (total % multiple_of > 0)
    assert batch.max_seqlen == max(np.diff(bounds))
    rows, targets = [], []
    for (prompt, response), start, end in zip(sequences, bounds, bounds[1:], strict=False):
        assert tokens[start:end] == prompt + response
        rows += range(start + len(prompt) - 1, end - 1)
        targets += response
    assert positions == [i for a, b in zip(bounds, bounds[1:], strict=False) for i in range(b - a)]
    assert batch.rows_R.tolist() == rows and batch.targets_R.tolist() == targets
    assert batch.segment_R.tolist() == [
        s for s, (_, response) in enumerate(sequences) for _ in response]


@given(st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4),
       st.sampled_from([1, 8]), st.sampled_from([0, 5]), st.data())
@settings(max_examples=100, deadline=None)
def test_attention_and_the_head_see_what_they_would_apart(groups, multiple_of, more, data):
    """Whole sequences in attention's places; every row the same token, position and target."""
    sequences = [(prompt, response) for prompt, responses in groups for response in responses]
    sharing = [len(responses) for _, responses in groups]
    masks = [data.draw(st.none() | st.lists(st.booleans(), min_size=len(r), max_size=len(r))
                       .filter(any)) for _, r in sequences]
    options = {"loss_masks": masks, "pad_id": EOS}
    together = pack(sequences, None, sharing=sharing, multiple_of=multiple_of, **options)
    apart = pack(sequences, None, **options)
    together = lengthen(together, together.tokens_T.shape[1] + more)
    tokens, positions = together.tokens_T[0], together.position_ids_T[0]
    count, places = len(apart.tokens_T[0]), len(tokens)
    if together.shared is not None:
        places = len(together.shared.rows_A)
        tokens, positions = (x[together.shared.rows_A] for x in (tokens, positions))
        assert len(together.tokens_T[0]) + len(together.shared.again_B) == places
        first = together.shared.rows_A[together.shared.first_T]
        assert first.tolist() == list(range(len(together.tokens_T[0])))
    else:
        assert set(sharing) == {1}
    assert tokens[:count].tolist() == apart.tokens_T[0].tolist()
    assert positions[:count].tolist() == apart.position_ids_T[0].tolist()
    bounds = together.cu_seqlens.tolist()
    assert bounds[: len(sequences) + 1] == apart.cu_seqlens.tolist() and bounds[-1] == places
    for name in ("targets_R", "segment_R", "lengths_S"):
        assert getattr(together, name).tolist() == getattr(apart, name).tolist(), name
    for name in ("rows_R", "final_S"):
        a, b = getattr(together, name), getattr(apart, name)
        assert together.position_ids_T[0][a].tolist() == apart.position_ids_T[0][b].tolist()
        assert together.tokens_T[0][a].tolist() == apart.tokens_T[0][b].tolist()


@pytest.mark.parametrize("sequences, refs", [
    ([], None), ([([], [1])], None), ([([1], [])], None), ([([1], [1])], [0.0, 0.0]),
])
def test_pack_refuses(sequences, refs):
    with pytest.raises(ValueError, match="length|ref_logps"):
        pack(sequences, refs)


def test_assign_by_hand():
    # Longest first: 9 -> bin 0, 8 -> bin 1, 7 -> bin 1 (8 < 9), 1 -> the only room, bin 0.
    assert assign([1, 9, 7, 8], num_bins=2, per_bin=2) == [[0, 1], [2, 3]]
    assert assign([5, 5, 5, 5], num_bins=2, per_bin=2) == [[0, 2], [1, 3]]
    assert assign([4, 3, 2], num_bins=1, per_bin=3) == [[0, 1, 2]]


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_assign_is_a_balanced_partition(num_bins, per_bin, data):
    size = num_bins * per_bin
    lengths = data.draw(st.lists(st.integers(1, 1000), min_size=size, max_size=size))
    bins = assign(lengths, num_bins, per_bin)
    assert [len(items) for items in bins] == [per_bin] * num_bins
    assert sorted(i for items in bins for i in items) == list(range(size))
    totals = [sum(lengths[i] for i in items) for items in bins]
    assert max(totals) - min(totals) <= max(lengths)
    assert bins == assign(np.array(lengths), num_bins, per_bin)


def test_assign_beats_the_order_of_arrival():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, size=256).astype(int)
    balanced = [lengths[items].sum() for items in assign(lengths, 16, 16)]
    arrival = lengths.reshape(16, 16).sum(axis=1)
    assert max(balanced) / np.mean(balanced) < 1.03
    assert max(arrival) / np.mean(arrival) > 1.3


def test_assign_refuses_other_sizes():
    with pytest.raises(ValueError, match="3 items do not fill num_bins=2"):
        assign([1, 2, 3], 2, 2)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 2000), st.data())
@settings(max_examples=100, deadline=None)
def test_assign_by_tokens_keeps_to_the_limit(unit, groups, max_tokens, data):
    size = unit * groups
    lengths = data.draw(st.lists(st.integers(1, 1000), min_size=size, max_size=size))
    bins = assign_by_tokens(lengths, max_tokens, unit)
    assert sorted(i for items in bins for i in items) == list(range(size)) and all(bins)
    assert len(bins) % unit == 0
    assert all(
        len(items) == 1 or sum(lengths[i] for i in items) <= max_tokens for items in bins
    )
    assert bins == assign_by_tokens(np.array(lengths), max_tokens, unit)


def test_assign_by_tokens_takes_few_bins_and_equal_ones():
    assert assign_by_tokens([5, 5, 5, 5], 10, 1) == [[0, 2], [1, 3]]
    assert assign_by_tokens([5, 5, 5, 5], 10, 4) == [[0], [1], [2], [3]]
    assert assign_by_tokens([30, 5, 5, 2], 10, 2) == [[0], [1], [2], [3]]
    assert assign_by_tokens([3, 2, 1], 100, 1) == [[0, 1, 2]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(500, 1100, size=256)
    bins = assign_by_tokens(lengths, 8192, 8)
    totals = [lengths[items].sum() for items in bins]
    assert len(bins) <= lengths.sum() / 8192 * 1.2 + 8
    by_rank = [sum(totals[rank::8]) for rank in range(8)]
    assert max(by_rank) / np.mean(by_rank) < 1.02
    with pytest.raises(ValueError, match="3 items are no multiple of 2"):
        assign_by_tokens([1, 2, 3], 9, 2)


@pytest.mark.parametrize("arguments, expected", [
    ({}, 1),
    ({"tensor_model_parallel_size": 4}, 1),
    ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
    ({"fp8_recipe": "delayed"}, 16),
    ({"fp8_recipe": "tensorwise"}, 16),
    ({"fp8_recipe": "mxfp8", "tensor_model_parallel_size": 2}, 32),
    ({"fp8_recipe": "blockwise", "tensor_model_parallel_size": 2, "sequence_parallel": True}, 256),
    ({"context_parallel_size": 2}, 4),
])
def test_alignment(arguments, expected):
    assert alignment(**arguments) == expected


def test_alignment_refuses_unknown_recipes():
    with pytest.raises(ValueError, match="fp8_recipe=fp4"):
        alignment(fp8_recipe="fp4")


def test_what_a_policy_step_needs_follows_the_rows():
    sampled = [np.array([-1, -2], np.float32), np.array([-3], np.float32)]
    batch = pack([([10], [20, 21]), ([12, 13], [22])], None, sampled_logprobs=sampled,
                 advantages=[0.5, -0.5])
    assert batch.sampled_logprobs_R is not None and batch.advantages_S is not None
    assert batch.sampled_logprobs_R.tolist() == [-1, -2, -3]
    assert batch.advantages_S.tolist() == [0.5, -0.5]
    assert batch.final_S.tolist() == [2, 5]
    assert batch.tokens_T[0, batch.final_S].tolist() == [21, 22]
    with pytest.raises(ValueError, match="sampled_logprobs of lengths"):
        pack([([10], [20, 21])], None, sampled_logprobs=sampled[1:])
