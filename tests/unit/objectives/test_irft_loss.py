"""The pair loss: hand-worked numbers, signs, splitting, gradients."""

import math

import pytest
import torch

from megatron_irl.objectives import MARGIN_LOSSES, irft_loss

# Two pairs. Order: demo_0, sample_0, demo_1, sample_1.
POLICY = torch.tensor([-10.0, -12.0, -30.0, -20.0], dtype=torch.float64)
REF = torch.tensor([-14.0, -11.0, -28.0, -22.0], dtype=torch.float64)
LENGTHS = torch.tensor([4, 2, 10, 5])


def loss_of(policy: torch.Tensor = POLICY, **options):
    return irft_loss(policy, REF.to(policy.dtype), LENGTHS, **{"beta": 0.5, **options})


def means(out) -> dict[str, float]:
    return {k: float(m.total) / (float(m.weight) if m.reduction == "mean" else 1.0)
            for k, m in out.metrics.items()}


@pytest.mark.parametrize(("loss", "expected"), [
    # D = 4, -1, -2, 2; g = 4 - (-1) = 5 and -2 - 2 = -4; beta * g = 2.5 and -2.
    ("linear", -2.5 + 2.0),
    ("hinge", 0.0 + 3.0),
    ("sigmoid", math.log(1 + math.exp(-2.5)) + math.log(1 + math.exp(2.0))),
])
def test_hand_worked_totals(loss: str, expected: float):
    out = loss_of(loss=loss)
    assert out.total.item() == pytest.approx(expected, rel=1e-14)
    assert out.weight.item() == 2 and out.weight.dtype == torch.int32


def test_hand_worked_metrics():
    """Rewards beta * D = 2, -0.5 | -1, 1; margins 2.5, -2, one of two positive."""
    out = loss_of()
    assert means(out) == {
        "reward/demo": (2 - 1) / 2, "reward/sample": (-0.5 + 1) / 2,
        "reward/margin": (2.5 - 2) / 2, "reward/accuracy": 0.5, "reward/abs_margin_max": 2.5,
        "logp/demo": -20.0, "logp/sample": -16.0, "logp/demo_per_token": -40 / 14,
        "length/demo": 7.0, "length/sample": 3.5,
    }
    assert out.metrics["reward/abs_margin_max"].reduction == "max"


def test_metrics_are_detached():
    out = loss_of(POLICY.clone().requires_grad_(), nll_coefficient=1.0)
    assert out.total.requires_grad
    assert not any(m.total.requires_grad for m in out.metrics.values())


def test_anchor_adds_the_mean_token_nll_of_each_demonstration():
    """-(-10)/4 + -(-30)/10 = 2.5 + 3 = 5.5; a tenth of it is 0.55."""
    plain, anchored = loss_of(), loss_of(nll_coefficient=0.1)
    assert anchored.total.item() == pytest.approx(plain.total.item() + 0.55, rel=1e-14)
    assert means(anchored)["loss/nll"] == pytest.approx(5.5 / 2)
    assert means(anchored)["loss/margin"] == pytest.approx(plain.total.item() / 2)
    assert "loss/nll" not in plain.metrics


def test_length_normalize_divides_each_log_ratio_by_its_own_length():
    """D / length = 4/4, -1/2 | -2/10, 2/5; g = 1.5, -0.6; linear: -0.5 * (1.5 - 0.6)."""
    out = loss_of(loss="linear", length_normalize=True)
    assert out.total.item() == pytest.approx(-0.45, rel=1e-14)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_policy_equal_to_reference_gives_ln_2_and_the_right_direction(beta: float):
    """Minimising must raise the demonstration and lower the sample: gradient -beta/2, +beta/2."""
    policy = REF.clone().requires_grad_()
    out = irft_loss(policy, REF, LENGTHS, beta=beta)
    assert out.total.item() / 2 == pytest.approx(math.log(2), rel=1e-15)
    assert means(out)["reward/accuracy"] == 0.5  # ties count half
    out.total.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-beta / 2, beta / 2] * 2, rel=1e-14)


def test_the_reference_gets_no_gradient():
    reference = REF.clone().requires_grad_()
    irft_loss(POLICY.clone().requires_grad_(), reference, LENGTHS, beta=0.5).total.backward()
    assert reference.grad is None


@pytest.mark.parametrize("loss", MARGIN_LOSSES)
@pytest.mark.parametrize("length_normalize", [False, True])
def test_gradcheck(loss: str, length_normalize: bool):
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_of(x, loss=loss, nll_coefficient=0.3,
                          length_normalize=length_normalize).total, policy)


@pytest.mark.parametrize("loss", MARGIN_LOSSES)
def test_split_batch_equals_whole_batch(loss: str):
    """Total, weight and gradient of microbatches add up to those of the batch."""
    generator = torch.Generator().manual_seed(7)
    policy = torch.randn(12, generator=generator, dtype=torch.float64) * 20
    ref = torch.randn(12, generator=generator, dtype=torch.float64) * 20
    lengths = torch.randint(1, 40, (12,), generator=generator)

    def run(pieces: list[slice]):
        leaf = policy.clone().requires_grad_()
        outs = [irft_loss(leaf[p], ref[p], lengths[p], beta=0.1, loss=loss, nll_coefficient=0.2)
                for p in pieces]
        total = torch.stack([o.total for o in outs]).sum()
        total.backward()
        sums = {k: sum(float(o.metrics[k].total) for o in outs) for k in ("reward/demo",
                                                                          "reward/accuracy")}
        return total.item(), sum(int(o.weight) for o in outs), leaf.grad, sums

    whole = run([slice(0, 12)])
    parts = run([slice(0, 2), slice(2, 10), slice(10, 12)])
    assert parts[0] == pytest.approx(whole[0], rel=1e-13)
    assert parts[1] == whole[1] == 6
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-14, atol=0)
    assert parts[3] == pytest.approx(whole[3], rel=1e-12)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(margin: float):
    """-log sigmoid(-1e4) is 1e4; log(sigmoid) would be log(0)."""
    policy = torch.tensor([margin, 0.0], requires_grad=True)
    out = irft_loss(policy, torch.zeros(2), torch.ones(2), beta=1.0)
    out.total.backward()
    assert out.total.item() == pytest.approx(max(-margin, 0.0))
    assert policy.grad is not None and policy.grad[0].item() == pytest.approx(
        -1.0 if margin < 0 else 0.0)


def test_half_precision_inputs_are_computed_in_float32():
    out = irft_loss(POLICY.bfloat16(), REF.float(), LENGTHS, beta=0.5)
    assert out.total.dtype == torch.float32


@pytest.mark.parametrize(("sizes", "message"), [
    ((4, 2, 4), "ref_logps_S \\(2,\\)"), ((3, 3, 3), "3 sequences are not pairs"),
    ((0, 0, 0), "0 sequences are not pairs"),
])
def test_bad_shapes_are_refused(sizes: tuple[int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        irft_loss(*(torch.zeros(n) for n in sizes), beta=0.1)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss=ipo is not one of sigmoid, hinge, linear"):
        loss_of(loss="ipo")
