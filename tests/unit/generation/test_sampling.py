import math

import numpy as np
import pytest
import torch

from megatron_irl.errors import UserError
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.sampling import filter_weights, sample_rows, uniforms


def draw(probabilities, u, **sampling):
    logits = torch.tensor(probabilities, dtype=torch.float64).log().float().expand(len(u), -1)
    return sample_rows(
        logits.clone(), torch.tensor(u, dtype=torch.float64), SamplingConfig(**sampling)
    )


def test_inverse_transform_by_hand():
    # cumulative: 0.1, 0.3, 0.6, 1.0
    tokens, logprobs = draw([0.1, 0.2, 0.3, 0.4], [0.0, 0.0999, 0.1001, 0.59, 0.61, 0.9999])
    assert tokens.tolist() == [0, 0, 1, 2, 3, 3]
    expected = [math.log(p) for p in (0.1, 0.1, 0.2, 0.3, 0.4, 0.4)]
    np.testing.assert_allclose(logprobs.numpy(), expected, rtol=1e-6)


def test_tokens_of_zero_probability_are_never_drawn():
    tokens, _ = draw([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.25, 0.4999999, 0.5000001, 1 - 1e-16])
    assert tokens.tolist() == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("vocab", [3, 255, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_match_probabilities(vocab, temperature):
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=rng)
    count = 40_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # an even sweep of [0, 1)
    tokens, logprobs = sample_rows(
        logits.expand(count, -1).clone(), grid, SamplingConfig(temperature=temperature)
    )
    frequencies = torch.bincount(tokens, minlength=vocab) / count
    expected = (logits.double() / temperature).softmax(-1)
    # An even sweep hits each interval of the unit line to within one grid step.
    assert (frequencies - expected).abs().max() < 1.01 / count
    raw = logits.double().log_softmax(-1)[tokens]  # of the untempered policy
    torch.testing.assert_close(logprobs.double(), raw, atol=2e-6, rtol=0)


def test_greedy_takes_the_maximum_and_its_untempered_logprob():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1).max(-1)
    for sampling in (SamplingConfig(temperature=0.0), SamplingConfig(top_k=1)):
        tokens, logprobs = sample_rows(logits.clone(), torch.rand(5).double(), sampling)
        assert torch.equal(tokens, expected.indices)
        torch.testing.assert_close(logprobs, expected.values)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, 1.0, {0, 3}),
        (0, 0.39, {3}),
        (0, 0.41, {0, 3}),
        (0, 0.71, {0, 2, 3}),
        (3, 0.5, {0, 3}),  # top-k first: 0.4 / 0.9 is less than a half
        (9, 1.0, {0, 1, 2, 3}),
    ],
)
def test_filters_by_hand(top_k, top_p, kept):
    weights = torch.tensor([[0.3, 0.1, 0.2, 0.4]])
    filtered = filter_weights(weights.clone(), top_k, top_p)
    assert set(filtered[0].nonzero()[:, 0].tolist()) == kept
    assert torch.equal(filtered[filtered > 0], weights[filtered > 0])


def test_nucleus_equals_a_full_sort_when_it_is_wide():
    logits = 0.1 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(3))
    weights = logits.exp()
    filtered = filter_weights(weights.clone(), 0, 0.9)
    for row, kept in zip(weights.double(), filtered, strict=True):
        ordered, order = row.sort(descending=True)
        size = int((ordered.cumsum(0) < 0.9 * row.sum()).sum()) + 1
        assert set(order[:size].tolist()) == set(kept.nonzero()[:, 0].tolist())


def test_logprob_under_filters_is_of_the_unfiltered_policy():
    tokens, logprobs = draw([0.1, 0.2, 0.3, 0.4], [0.0, 0.9], top_p=0.6, temperature=0.5)
    assert tokens.tolist() == [2, 3]
    np.testing.assert_allclose(logprobs.numpy(), np.log([0.3, 0.4]), rtol=1e-6)


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    _, logprobs = sample_rows(logits, torch.zeros(1, dtype=torch.float64), SamplingConfig())
    assert logprobs.item() == pytest.approx(-math.log(1000), abs=1e-6)


def test_uniforms_depend_on_seed_and_key_alone():
    assert np.array_equal(uniforms(1, 2, 5), uniforms(1, 2, 9)[:5])
    assert not np.array_equal(uniforms(1, 2, 5), uniforms(1, 3, 5))
    assert not np.array_equal(uniforms(1, 2, 5), uniforms(2, 2, 5))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_values_out_of_range_are_the_users_error(bad):
    with pytest.raises(UserError, match=f"generation.{next(iter(bad))}="):
        SamplingConfig(**bad)
