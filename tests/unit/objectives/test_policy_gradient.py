"""The clipped policy gradient and its baseline: hand-worked numbers, clipping, splitting."""

import math

import pytest
import torch

from megatron_irl.objectives import leave_one_out, policy_gradient_loss

# Two samples of 2 and 1 tokens with ratios 1, 2 | 0.5.
SAMPLED = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
RATIOS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
LOGPROBS = SAMPLED + RATIOS.log()
SEGMENT = torch.tensor([0, 0, 1])


def loss_of(logprobs=LOGPROBS, advantages=(1.0, -2.0), **options):
    return policy_gradient_loss(
        logprobs, SAMPLED, torch.tensor(advantages, dtype=torch.float64), SEGMENT, 2,
        **{"clip_low": 0.2, "clip_high": 0.3, **options})


@pytest.mark.parametrize(("advantages", "expected", "clipped"), [
    # A = 1: min(1, 1) + min(2, 1.3) = 2.3. A = -2: min(-1, 0.8 * -2) = -1.6.
    ((1.0, -2.0), -(2.3 - 1.6), 2),
    # The other way about nothing is clipped: ratio 2 with A < 0 and 0.5 with A > 0 must be undone.
    ((-1.0, 2.0), -(-3.0 + 1.0), 0),
    ((0.0, 0.0), 0.0, 0),
])
def test_hand_worked_totals(advantages, expected: float, clipped: int):
    out = loss_of(advantages=advantages)
    assert out.total.item() == pytest.approx(expected, rel=1e-14)
    assert out.weight.item() == 2 and out.weight.dtype == torch.int32
    assert out.metrics["policy/clip_fraction"].total.item() == clipped


def test_hand_worked_metrics():
    out = loss_of(LOGPROBS.clone().requires_grad_())
    means = {k: float(m.total / m.weight) for k, m in out.metrics.items()}
    entropy = -(1 * -1.0 + 2 * (-2 + math.log(2)) + 0.5 * (-0.5 - math.log(2))) / 3
    kl = ((2 * math.log(2) - 2 + 1) + (-0.5 * math.log(2) - 0.5 + 1)) / 3
    assert means == pytest.approx({
        "policy/ratio": 3.5 / 3, "policy/clip_fraction": 2 / 3, "policy/entropy": entropy,
        "policy/kl_to_sampler": kl,
    }, rel=1e-12)
    assert not any(m.total.requires_grad for m in out.metrics.values())


def test_entropy_and_kl_estimates_are_unbiased():
    """Their expectation over the sampler's tokens, listed, is the policy's entropy and KL."""
    policy, sampler = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    entropy = kl = 0.0
    for token in range(6):
        out = policy_gradient_loss(policy[token : token + 1], sampler[token : token + 1],
                                   torch.ones(1), torch.zeros(1, dtype=torch.int64), 1,
                                   clip_low=0.2, clip_high=0.2)
        entropy += sampler[token].exp().item() * out.metrics["policy/entropy"].total.item()
        kl += sampler[token].exp().item() * out.metrics["policy/kl_to_sampler"].total.item()
    assert entropy == pytest.approx(-(policy.exp() * policy).sum().item(), rel=1e-12)
    assert kl == pytest.approx((policy.exp() * (policy - sampler)).sum().item(), rel=1e-12)


def test_gradient_on_policy_is_minus_the_advantage_for_every_token():
    logprobs = SAMPLED.clone().requires_grad_()
    loss_of(logprobs, advantages=(1.5, -2.0)).total.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.5, -1.5, 2.0]


def test_clipped_tokens_have_no_gradient_and_constants_none():
    logprobs = LOGPROBS.clone().requires_grad_()
    sampled = SAMPLED.clone().requires_grad_()
    advantages = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    policy_gradient_loss(logprobs, sampled, advantages, SEGMENT, 2, clip_low=0.2,
                         clip_high=0.3).total.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
    assert sampled.grad is None and advantages.grad is None


def test_gradcheck():
    torch.manual_seed(0)
    logprobs = (SAMPLED + 0.4 * torch.randn(3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(x).total, logprobs)


def test_split_batch_equals_whole_batch():
    """Sequences of 3, 1, 4 and 2 tokens, whole and one at a time."""
    lengths, advantages = torch.tensor([3, 1, 4, 2]), torch.randn(4, dtype=torch.float64)
    logprobs, sampled = -torch.rand(2, 10, dtype=torch.float64)
    whole = policy_gradient_loss(logprobs, sampled, advantages,
                                 torch.arange(4).repeat_interleave(lengths), 4, clip_low=0.1,
                                 clip_high=0.1)
    parts = [policy_gradient_loss(p, q, a, torch.zeros(len(p), dtype=torch.int64), 1,
                                  clip_low=0.1, clip_high=0.1)
             for p, q, a in zip(logprobs.split(lengths.tolist()), sampled.split(lengths.tolist()),
                                advantages.split(1), strict=True)]
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-12)
    assert sum(int(p.weight) for p in parts) == int(whole.weight) == 4
    for key in whole.metrics:
        assert sum(float(p.metrics[key].total) for p in parts) == pytest.approx(
            float(whole.metrics[key].total), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(advantage: float, difference: float):
    logprobs = torch.tensor([difference], requires_grad=True)
    out = policy_gradient_loss(logprobs, torch.zeros(1), torch.tensor([advantage]),
                               torch.zeros(1, dtype=torch.int64), 1, clip_low=0.2, clip_high=0.2)
    out.total.backward()
    assert torch.isfinite(out.total) and logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(m.total.item()) for m in out.metrics.values())


@pytest.mark.parametrize(("rewards", "expected"), [
    ([[1.0, 4.0]], [[-3.0, 3.0]]),
    ([[0.0, 3.0, 6.0], [2.0, 2.0, 2.0]], [[-4.5, 0.0, 4.5], [0.0, 0.0, 0.0]]),
])
def test_leave_one_out_by_hand(rewards, expected):
    leaf = torch.tensor(rewards, requires_grad=True)
    advantages = leave_one_out(leaf)
    assert advantages.tolist() == expected and not advantages.requires_grad


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = torch.randn(5, 4, dtype=torch.float64)
    for p in range(5):
        for k in range(4):
            others = [rewards[p, j].item() for j in range(4) if j != k]
            assert leave_one_out(rewards)[p, k].item() == pytest.approx(
                rewards[p, k].item() - sum(others) / 3, abs=1e-12)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_leave_one_out_needs_two_samples(shape):
    with pytest.raises(ValueError, match="at least 2 samples a prompt"):
        leave_one_out(torch.zeros(shape))


@pytest.mark.parametrize(("options", "message"), [
    ({"advantages": (1.0,)}, "advantages_S has shape \\(1,\\); it must be \\[2\\]"),
    ({"logprobs": torch.zeros(2)}, "logprobs_R has shape \\(2,\\)"),
    ({"clip_low": 0.0}, "clip_low=0.0"), ({"clip_low": 1.5}, "clip_low=1.5"),
    ({"clip_high": -0.1}, "clip_high=-0.1"),
])
def test_bad_inputs_are_refused(options, message: str):
    with pytest.raises(ValueError, match=message):
        loss_of(**options)
