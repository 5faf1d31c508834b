"""Negative log-likelihood as a sum with its count."""

import pytest
import torch

from megatron_irl.objectives import sequence_logprobs, sft_loss

SEGMENTS = torch.tensor([0, 0, 0, 1])


def test_hand_worked():
    """Sequences (-0.5, -1.0, -1.5) and (-2.0): total 3 + 2 = 5 over 4 tokens, 1.25 a token.

    logp/demo = (-3 - 2) / 2 = -2.5, length/demo = 4 / 2 = 2.
    """
    logprobs = torch.tensor([-0.5, -1.0, -1.5, -2.0])
    out = sft_loss(logprobs, sequence_logprobs(logprobs, SEGMENTS, 2))
    assert out.total.item() == 5.0
    assert out.weight.item() == 4 and out.weight.dtype == torch.int32
    means = {key: float(m.total) / float(m.weight) for key, m in out.metrics.items()}
    assert means == {"logp/demo": -2.5, "logp/demo_per_token": -1.25, "length/demo": 2.0}
    assert not any(m.total.requires_grad for m in out.metrics.values())


def test_gradient_is_minus_one_per_token():
    logprobs = torch.randn(4, dtype=torch.float64, requires_grad=True)
    sft_loss(logprobs, sequence_logprobs(logprobs, SEGMENTS, 2)).total.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.0] * 4


@pytest.mark.parametrize("cut", [1, 3])
def test_split_batch_equals_whole_batch(cut: int):
    torch.manual_seed(cut)
    logprobs = torch.randn(4, dtype=torch.float64)
    whole = sft_loss(logprobs, logprobs)
    parts = [sft_loss(part, part) for part in (logprobs[:cut], logprobs[cut:])]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total, rtol=1e-14, atol=0)
    assert sum(int(p.weight) for p in parts) == int(whole.weight)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[R\] and \[S\]"):
        sft_loss(torch.zeros(1, 4), torch.zeros(2))


def test_tokens_may_count_by_their_probability():
    """pi = 1/2 and 1/4: total = ln(2)/2 + ln(4)/4 = ln 2, and the gradient is -pi."""
    logprobs = torch.tensor([0.5, 0.25], dtype=torch.float64).log().requires_grad_()
    out = sft_loss(logprobs, logprobs.sum()[None], by_probability=True)
    torch.testing.assert_close(out.total, torch.tensor(2.0, dtype=torch.float64).log())
    out.total.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(-logprobs.grad, torch.tensor([0.5, 0.25], dtype=torch.float64))
    # What is reported stays the likelihood itself.
    assert out.metrics["logp/demo_per_token"].total.item() == pytest.approx(-3 * 0.6931471805599453)


def test_targets_may_be_smoothed():
    """pi = 1/2, 1/4 and 1/4, the first is right: -(0.8 ln(1/2) + 0.2 mean of the three logs)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    first, mean = logprobs[:, 0], logprobs.mean(-1)
    out = sft_loss(first, first.detach(), mean_R=mean, smoothing=0.2)
    ln2 = 0.6931471805599453
    assert out.total.item() == pytest.approx(0.8 * ln2 + 0.2 * (1 + 2 + 2) / 3 * ln2, rel=1e-14)
    assert out.metrics["logp/demo_per_token"].total.item() == pytest.approx(-ln2)
    out.total.backward()
    other = logits.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(other, torch.tensor([0]), label_smoothing=0.2)
    torch.testing.assert_close(out.total, expected)
    expected.backward()
    torch.testing.assert_close(logits.grad, other.grad)
