"""What the paper says of Algorithm 1, exactly, where all fifteen responses are listed.

The toy and its numbers are those of the docs' figure (tools/plot_rft_theory.py). Expectations are
sums over responses, pairs or draws; only the test that says so samples.
"""

import math

import pytest
import torch
from torch import nn

from megatron_irl.objectives import leave_one_out, reward_loss
from tools import plot_rft_theory as toy

seeds = pytest.mark.parametrize("seed", range(3))
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def test_the_responses_are_all_there():
    assert toy.NUM_RESPONSES == len(set(toy.RESPONSES)) == 1 + 2 + 4 + 8
    logits, _, _ = toy.policy_toy(0)
    assert toy.response_logprobs(logits).exp().sum().item() == pytest.approx(1, abs=1e-14)


# Reward learning ----------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("bound", [None, 50.0])
def test_linear_reward_gradient_is_demonstrations_minus_policy(seed: int, bound):
    """Of a small network r, pair by pair: -(E_demo grad r - E_policy grad r)."""
    demo, policy = toy.distributions(seed, 2)
    torch.manual_seed(seed)
    features = torch.randn(toy.NUM_RESPONSES, 4, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()
    parameters = list(network.parameters())
    rewards = network(features).squeeze(-1)
    analytic = torch.autograd.grad((demo - policy) @ rewards, parameters, retain_graph=True)
    ours = [torch.zeros_like(p) for p in parameters]
    for y in range(toy.NUM_RESPONSES):
        for z in range(toy.NUM_RESPONSES):
            total = reward_loss(rewards[torch.tensor([y, z])], loss="linear", bound=bound).total
            parts = torch.autograd.grad(total, parameters, retain_graph=True)
            for mine, part in zip(ours, parts, strict=True):
                mine -= demo[y] * policy[z] * part
    for mine, theirs in zip(ours, analytic, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@seeds
def test_logistic_at_equal_rewards_is_half_the_linear_gradient(seed: int):
    demo, policy = toy.distributions(seed, 2)
    logistic, linear = (
        toy.expected_reward_gradient(torch.zeros_like(demo), demo, policy, loss=loss)
        for loss in ("logistic", "linear"))
    torch.testing.assert_close(logistic, linear / 2, **EXACT)
    torch.testing.assert_close(linear, policy - demo, **EXACT)


@seeds
def test_reward_gradient_is_the_likelihood_gradient_of_the_exact_policy(seed: int):
    """Times -1 / beta: autograd through log(pi_ref * exp(r / beta) / Z) says the same."""
    demo, ref, other = toy.distributions(seed, 3)
    reward = other.log().requires_grad_()
    policy = toy.optimal_policy(ref, reward)
    (direct,) = torch.autograd.grad(demo @ policy.log(), reward)
    pairs = toy.expected_reward_gradient(reward, demo, policy.detach())
    torch.testing.assert_close(-pairs / toy.BETA, direct, **EXACT)
    torch.testing.assert_close(toy.likelihood_gradient(demo, policy), direct, **EXACT)


@seeds
def test_optimal_policy_has_no_policy_gradient_left(seed: int):
    """pi_ref * exp(r / beta) / Z is a stationary point of E[r] - beta * KL(pi || pi_ref)."""
    ref, other = toy.distributions(seed, 2)
    reward = 2 * other.log()
    logits = toy.optimal_policy(ref, reward).log().requires_grad_()
    policy = logits.softmax(-1)
    value = (policy * (reward - toy.BETA * (policy / ref).log())).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


@pytest.mark.parametrize("reward_steps", [1, 2])
def test_alternation_reaches_the_demonstrations(reward_steps: int):
    """The likelihood gradient goes to zero and the policy to the demonstrations, without a rise."""
    demo, ref = toy.distributions(0, 2)
    rows = toy.alternate(demo, ref, rounds=600, reward_steps=reward_steps, step=1 / reward_steps)
    assert rows[0]["kl"] == pytest.approx(toy.divergence(demo, ref)) and rows[0]["kl"] > 0.5
    assert rows[-1]["gradient"] < 1e-12 and rows[-1]["kl"] < 2e-12
    assert all(b["kl"] <= a["kl"] + 1e-14 for a, b in zip(rows, rows[1:], strict=False))


# Staleness ----------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("reward_steps", [2, 8, 32])
def test_bias_of_frozen_samples_is_the_derived_one(seed: int, reward_steps: int):
    """To leading order in K / T: at K / T = 1e-4 within 1%; fresh samples (K = 1) have none."""
    demo, ref = toy.distributions(seed, 2)
    bias, derived = toy.first_round_bias(demo, ref, reward_steps * 10_000, reward_steps)
    assert bias == pytest.approx(derived, rel=0.01) and bias > 0
    assert toy.first_round_bias(demo, ref, 16, 1) == (pytest.approx(0, abs=1e-28), 0)


@seeds
def test_bias_grows_as_k_over_t(seed: int):
    """Twice the K at the same T doubles it; twice K and T leaves it, both as K grows."""
    demo, ref = toy.distributions(seed, 2)
    bias = {(t, k): toy.first_round_bias(demo, ref, t, k)[0]
            for t, k in ((4096, 32), (4096, 64), (8192, 64))}
    assert bias[4096, 64] / bias[4096, 32] == pytest.approx(2, rel=0.05)
    assert bias[8192, 64] / bias[4096, 32] == pytest.approx(1, rel=0.05)


def test_growing_k_at_fixed_t_first_helps_and_then_harms():
    """More steps help while K is small; at K = 4 T staleness undoes it, and fresh samples do not.

    The numbers are the figure's (T = 16), to the digits the docs give.
    """
    demo, ref = toy.distributions(0, 2)
    few, some, many = (toy.mean_gradient(demo, ref, 16, k) for k in (1, 8, 64))
    assert (few, some, many) == (pytest.approx(0.127, abs=5e-4), pytest.approx(0.0369, abs=5e-5),
                                 pytest.approx(0.456, abs=5e-4))
    fresh = toy.alternate(demo, ref, rounds=16 * 64, reward_steps=1, step=toy.step_size(16, 64))
    assert sum(row["gradient"] for row in fresh) / len(fresh) < some


def test_frozen_samples_can_keep_a_step_from_converging():
    """160 steps of 1: with fresh samples they converge, in rounds of four they swing for ever."""
    demo, ref = toy.distributions(0, 2)
    fresh, stale = (toy.alternate(demo, ref, rounds=160 // k, reward_steps=k, step=1.0)
                    for k in (1, 4))
    assert fresh[-1]["gradient"] < 1e-5 and fresh[-1]["kl"] < 1e-4
    assert min(row["gradient"] for row in stale[-8:]) > 0.01


def test_the_gradient_falls_as_the_root_of_the_steps():
    """The rate of the paper, 1 / sqrt(TK), of the mean; the smallest falls faster."""
    slopes = toy.convergence_slopes(2, (16, 32, 64), 3)
    mean, low, high = toy.interval(slopes["mean"])
    assert -0.6 < low <= mean <= high < -0.4
    assert max(slopes["min"]) < -1


# The policy gradient ------------------------------------------------------------------------------


@seeds
def test_estimator_is_unbiased_over_every_draw(seed: int):
    """K = 2: all 225 draws of two responses, each through the loss, against the enumerated sum."""
    logits, rewards, ref = toy.policy_toy(seed)
    probabilities = toy.response_logprobs(logits).exp()
    shaped = toy.shaped_rewards(logits, rewards, ref)
    mean = torch.zeros_like(logits)
    for y in range(toy.NUM_RESPONSES):
        for z in range(toy.NUM_RESPONSES):
            draw = torch.tensor([[y, z]])
            estimate = toy.estimated_policy_gradient(logits, draw, leave_one_out(shaped[draw]))
            mean += probabilities[y] * probabilities[z] * estimate
    exact = toy.exact_policy_gradient(logits, rewards, ref)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(mean, exact, **EXACT)


@seeds
@pytest.mark.parametrize("baseline", [False, True])
def test_estimator_moments_have_the_exact_mean(seed: int, baseline: bool):
    logits, rewards, ref = toy.policy_toy(seed)
    mean, _ = toy.estimator_moments(logits, rewards, ref, 3, baseline=baseline)
    torch.testing.assert_close(mean, toy.exact_policy_gradient(logits, rewards, ref), **EXACT)


def test_sampled_estimates_agree_within_their_error():
    """400 batches of 8 prompts x 4 samples: each coordinate within 4.5 standard errors.

    For 21 coordinates that fails by chance once in seven thousand seeds. The batches' total
    variance is also the enumerated one over 8, within 20% (its own error is about 3%).
    """
    logits, rewards, ref = toy.policy_toy(0)
    shaped = toy.shaped_rewards(logits, rewards, ref)
    generator = torch.Generator().manual_seed(1)
    probabilities = toy.response_logprobs(logits).exp()
    estimates = []
    for _ in range(400):
        draws = torch.multinomial(probabilities, 32, replacement=True, generator=generator)
        draws = draws.view(8, 4)
        estimates.append(
            toy.estimated_policy_gradient(logits, draws, leave_one_out(shaped[draws])))
    stacked = torch.stack(estimates)
    error = stacked.std(0) / math.sqrt(len(estimates))
    exact = toy.exact_policy_gradient(logits, rewards, ref)
    assert ((stacked.mean(0) - exact).abs() < 4.5 * error).all()
    _, variance = toy.estimator_moments(logits, rewards, ref, 4, baseline=True)
    assert stacked.var(0).sum().item() == pytest.approx(variance / 8, rel=0.2)


@seeds
@pytest.mark.parametrize("num_samples", [2, 3])
def test_leave_one_out_varies_less_than_reinforce(seed: int, num_samples: int):
    """With rewards around a level of eight times their spread; exact, over every draw.

    Leave-one-out does not see the level; plain REINFORCE's variance grows with its square.
    """
    variances = {}
    for level in (0.0, 8.0):
        toys = toy.policy_toy(seed, level)
        for baseline in (False, True):
            _, variances[level, baseline] = toy.estimator_moments(*toys, num_samples,
                                                                  baseline=baseline)
    assert variances[8.0, True] < 0.5 * variances[8.0, False]
    assert variances[8.0, True] == pytest.approx(variances[0.0, True], rel=1e-9)
    assert variances[8.0, False] > 4 * variances[0.0, False]
