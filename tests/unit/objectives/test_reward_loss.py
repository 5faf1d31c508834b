"""The explicit reward's pair loss: hand-worked numbers, the bound, splitting, gradients."""

import math

import pytest
import torch
from torch import Tensor

from megatron_irl.objectives import REWARD_LOSSES, reward_loss

# Three pairs: margins 2.5, -4 and 0.
REWARDS = torch.tensor([2.0, -0.5, -1.0, 3.0, 0.5, 0.5], dtype=torch.float64)


def gradient(rewards: Tensor, **options) -> list[float]:
    leaf = rewards.clone().requires_grad_()
    reward_loss(leaf, **{"loss": "linear", "bound": None, **options}).total.backward()
    assert leaf.grad is not None
    return leaf.grad.tolist()


@pytest.mark.parametrize(("loss", "bound", "expected"), [
    ("linear", None, -2.5 + 4.0 - 0.0),
    # bound 1: demos min(., 1) = 1, -1, 0.5; samples max(., -1) = -0.5, 3, 0.5.
    ("linear", 1.0, -(1.0 + 0.5) - (-1.0 - 3.0) - 0.0),
    ("logistic", None, math.log(1 + math.exp(-2.5)) + math.log(1 + math.exp(4)) + math.log(2)),
    ("logistic", 1.0, math.log(1 + math.exp(-2.5)) + math.log(1 + math.exp(4)) + math.log(2)),
])
def test_hand_worked_totals(loss, bound, expected: float):
    out = reward_loss(REWARDS, loss=loss, bound=bound)
    assert out.total.item() == pytest.approx(expected, rel=1e-14)
    assert out.weight.item() == 3 and out.weight.dtype == torch.int32


def test_hand_worked_metrics():
    out = reward_loss(REWARDS.clone().requires_grad_(), loss="logistic", bound=None, weight=0.5)
    means = {k: float(m.total / m.weight) for k, m in out.metrics.items()}
    assert means == pytest.approx({
        "reward/demo": 0.5, "reward/sample": 1.0, "reward/margin": -0.5,
        "reward/accuracy": 0.5,  # one won, one lost, one tie
        "reward/spread": 6.5 / 3, "reward/abs_max": 3.0,
    })
    assert out.metrics["reward/abs_max"].reduction == "max"
    assert not any(m.total.requires_grad for m in out.metrics.values())


def test_weight_scales_the_total_and_not_the_count():
    whole, part = (reward_loss(REWARDS, loss="logistic", bound=None, weight=w) for w in (1, 0.25))
    assert part.total.item() == pytest.approx(whole.total.item() / 4, rel=1e-15)
    assert part.weight.item() == 3


def test_linear_gradient_inside_the_bound_is_exactly_the_unbounded_one():
    inside = REWARDS.clamp(-1.9, 1.9)
    assert gradient(inside, bound=2.0) == gradient(inside) == [-1.0, 1.0] * 3


@pytest.mark.parametrize(("demo", "sample", "expected"), [
    (2.5, 0.0, [0.0, 1.0]),  # a demonstration is not pushed above the bound
    (0.0, -2.5, [-1.0, 0.0]),  # nor a sample below it
    (-9.0, 9.0, [-1.0, 1.0]),  # but on the wrong side both come back
    (9.0, 9.0, [0.0, 1.0]), (-9.0, -9.0, [-1.0, 0.0]),  # and so does the level
])
def test_bound_stops_only_the_outward_push(demo: float, sample: float, expected: list[float]):
    pair = torch.tensor([demo, sample], dtype=torch.float64)
    assert gradient(pair, bound=2.0) == expected


def test_bounded_linear_loss_does_not_run_away_and_the_unbounded_does():
    """200 steps of 0.1 on one frozen pair: 20 without a bound; with it, the step past 2."""
    ends = {}
    for bound in (None, 2.0):
        rewards = torch.zeros(2, dtype=torch.float64)
        for _ in range(200):
            rewards -= 0.1 * torch.tensor(gradient(rewards, bound=bound))
        ends[bound] = rewards.tolist()
        if bound:
            assert reward_loss(rewards, loss="linear", bound=bound).total.item() == -2 * bound
    assert ends[None] == pytest.approx([20, -20])
    assert 2 <= ends[2.0][0] <= 2.1 + 1e-9 and -2.1 - 1e-9 <= ends[2.0][1] <= -2


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_equal_rewards_give_the_right_direction(loss):
    half = 0.5 if loss == "logistic" else 1.0
    assert gradient(torch.zeros(2, dtype=torch.float64), loss=loss, bound=3.0) == [-half, half]


@pytest.mark.parametrize("loss", REWARD_LOSSES)
@pytest.mark.parametrize("bound", [None, 1.3])
def test_gradcheck(loss, bound):
    torch.manual_seed(0)
    rewards = (2 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r: reward_loss(r, loss=loss, bound=bound, weight=0.7).total, rewards)


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_split_batch_equals_whole_batch(loss):
    rewards = 3 * torch.randn(12, dtype=torch.float64)
    pieces = [slice(0, 2), slice(2, 10), slice(10, 12)]
    whole = reward_loss(rewards, loss=loss, bound=1.0)
    parts = [reward_loss(rewards[p], loss=loss, bound=1.0) for p in pieces]
    assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-13)
    assert sum(int(p.weight) for p in parts) == int(whole.weight) == 6
    for key in ("reward/margin", "reward/accuracy", "reward/spread"):
        assert sum(float(p.metrics[key].total) for p in parts) == pytest.approx(
            float(whole.metrics[key].total), rel=1e-12)
    assert sum((gradient(rewards[p], loss=loss) for p in pieces), []) == gradient(rewards,
                                                                                 loss=loss)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin: float):
    rewards = torch.tensor([margin, 0.0], requires_grad=True)
    out = reward_loss(rewards, loss="logistic", bound=None)
    out.total.backward()
    assert out.total.item() == pytest.approx(max(-margin, 0.0))
    assert rewards.grad is not None and torch.isfinite(rewards.grad).all()


def test_half_precision_is_computed_in_float32():
    assert reward_loss(REWARDS.bfloat16(), loss="logistic",
                       bound=None).total.dtype == torch.float32


@pytest.mark.parametrize(("size", "options", "message"), [
    (3, {}, "shape \\(3,\\)"), (0, {}, "shape \\(0,\\)"),
    (2, {"loss": "hinge"}, "loss=hinge is not one of logistic, linear"),
    (2, {"bound": 0.0}, "bound=0.0 must be above 0"),
    (2, {"bound": float("nan")}, "bound=nan"),
])
def test_bad_inputs_are_refused(size: int, options, message: str):
    with pytest.raises(ValueError, match=message):
        reward_loss(torch.zeros(size), **{"loss": "linear", "bound": None, **options})
