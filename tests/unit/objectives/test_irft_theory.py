"""What the paper's objective says, checked exactly on a five-action softmax policy.

One prompt, five responses; every expectation is a sum over all actions or pairs, so that nothing
here is statistical. Seeds are parametrised: the identities hold for any numbers.
"""

import pytest
import torch
from torch import Tensor

from megatron_irl.objectives import irft_loss, sft_loss

NUM_ACTIONS = 5
ONE = torch.ones(2, dtype=torch.int64)
seeds = pytest.mark.parametrize("seed", range(3))


def distributions(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, NUM_ACTIONS, generator=generator, dtype=torch.float64)
    return list(logits.softmax(-1))


def expected_pair_gradient(
    theta: Tensor, log_policy: Tensor, ref: Tensor, demo: Tensor, sample: Tensor, **options
) -> Tensor:
    """E over y ~ demo, z ~ sample of the gradient of one pair's loss with respect to theta."""
    gradient = torch.zeros_like(theta)
    for y in range(NUM_ACTIONS):
        for z in range(NUM_ACTIONS):
            pair = torch.tensor([y, z])
            total = irft_loss(log_policy[pair], ref.log()[pair], ONE, **options).total
            (part,) = torch.autograd.grad(total, theta, retain_graph=True)
            gradient += demo[y] * sample[z] * part
    return gradient


def expected_sft_gradient(theta: Tensor, log_policy: Tensor, demo: Tensor) -> Tensor:
    gradient = torch.zeros_like(theta)
    for y in range(NUM_ACTIONS):
        total = sft_loss(log_policy[y : y + 1], log_policy[y : y + 1]).total
        gradient += demo[y] * torch.autograd.grad(total, theta, retain_graph=True)[0]
    return gradient


@seeds
def test_linear_loss_on_policy_is_sft_in_expectation(seed: int):
    """E_z grad log pi(z) = 0, so only the demonstration's term is left: beta times SFT's."""
    demo, ref, start = distributions(seed, 3)
    theta = start.log().requires_grad_()
    log_policy = theta.log_softmax(-1)
    ours = expected_pair_gradient(theta, log_policy, ref, demo, log_policy.detach().exp(),
                                  beta=0.3, loss="linear")
    sft = expected_sft_gradient(theta, log_policy, demo)
    torch.testing.assert_close(ours, 0.3 * sft, rtol=1e-12, atol=1e-14)


@seeds
def test_sigmoid_loss_on_policy_is_not_sft(seed: int):
    """Away from the reference h' differs between pairs, and the direction is another one."""
    demo, ref, start = distributions(seed, 3)
    theta = start.log().requires_grad_()
    log_policy = theta.log_softmax(-1)
    ours = expected_pair_gradient(theta, log_policy, ref, demo, log_policy.detach().exp(),
                                  beta=1.0, loss="sigmoid")
    sft = expected_sft_gradient(theta, log_policy, demo)
    assert torch.nn.functional.cosine_similarity(ours, sft, dim=0) < 1 - 1e-4


@seeds
def test_sigmoid_loss_at_the_reference_is_half_the_linear_one(seed: int):
    """There every margin is 0 and h' = -1/2: the first step of a round goes SFT's way."""
    demo, ref = distributions(seed, 2)
    theta = ref.log().requires_grad_()
    log_policy = theta.log_softmax(-1)
    ours = expected_pair_gradient(theta, log_policy, ref, demo, ref, beta=0.3, loss="sigmoid")
    sft = expected_sft_gradient(theta, log_policy, demo)
    torch.testing.assert_close(ours, 0.15 * sft, rtol=1e-12, atol=1e-14)


@seeds
def test_linear_loss_on_frozen_samples_never_vanishes(seed: int):
    """Its logit gradient is -beta * (demo - q) wherever the policy is, even at the optimum."""
    demo, ref, frozen, start = distributions(seed, 4)
    for logits in (start.log(), demo.log(), ref.log()):
        theta = logits.clone().requires_grad_()
        ours = expected_pair_gradient(theta, theta.log_softmax(-1), ref, demo, frozen, beta=0.3,
                                      loss="linear")
        torch.testing.assert_close(ours, -0.3 * (demo - frozen), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@seeds
def test_a_round_carried_to_its_end_overshoots_the_demonstrations(seed: int, beta: float):
    """On samples of the reference the sigmoid loss ends at pi_ref * (demo / pi_ref)^(1 / beta).

    A pair's best margin is the log odds of which of the two is the demonstration. At beta = 1 that
    policy is the demonstrations' distribution; below, it goes on in their direction.
    """
    demo, ref = distributions(seed, 2)
    theta = (ref.log() + (demo.log() - ref.log()) / beta).requires_grad_()
    log_policy = theta.log_softmax(-1)
    gradient = expected_pair_gradient(theta, log_policy, ref, demo, ref, beta=beta, loss="sigmoid")
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    if beta == 1.0:
        torch.testing.assert_close(log_policy.exp(), demo, rtol=1e-12, atol=0)


@seeds
def test_drafts_among_the_demonstrations_cancel(seed: int):
    """Half drafts, half one edited answer: imitation gives it half, the end of a round nearly all.

    A second round, whose samples are edited already, ends far below the demonstrations' half.
    """
    (ref,) = distributions(seed, 1)
    edited = torch.zeros_like(ref)
    edited[int(ref.argmin())] = 1.0
    demo, beta = 0.5 * edited + 0.5 * ref, 0.1
    first = (ref.log() + (demo.log() - ref.log()) / beta).softmax(-1)
    second = (first.log() + (demo.log() - first.log()) / beta).softmax(-1)
    assert (demo @ edited) < 0.7
    assert (first @ edited) > 0.999
    assert (second @ edited) < 1e-3


@seeds
def test_margin_recovers_the_explicit_reward(seed: int):
    """With pi = pi_ref * exp(r / beta) / Z, beta * g is r(y) - r(z): Z cancels."""
    ref, other = distributions(seed, 2)
    reward, beta = 3 * other.log(), 0.7
    log_policy = (ref.log() + reward / beta).log_softmax(-1)
    for y in range(NUM_ACTIONS):
        for z in range(NUM_ACTIONS):
            pair = torch.tensor([y, z])
            out = irft_loss(log_policy[pair], ref.log()[pair], ONE, beta=beta, loss="linear")
            torch.testing.assert_close(-out.total, reward[y] - reward[z], rtol=1e-12, atol=1e-12)


@seeds
def test_minimax_gradient_identity(seed: int):
    """For the same policy, dL/dr = (E_demo grad r - E_pi grad r) / beta, L = E_demo log pi.

    Three ways: SFT's loss through the closed-form policy, the linear pair loss on policy, and the
    formula, where grad r(y) with respect to a tabular r is the indicator of y.
    """
    demo, ref, other = distributions(seed, 3)
    beta = 0.7
    reward = other.log().requires_grad_()
    log_policy = (ref.log() + reward / beta).log_softmax(-1)
    policy = log_policy.detach().exp()
    formula = (demo - policy) / beta
    likelihood = -expected_sft_gradient(reward, log_policy, demo)
    pairs = -expected_pair_gradient(reward, log_policy, ref, demo, policy, beta=beta,
                                    loss="linear") / beta
    torch.testing.assert_close(likelihood, formula, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pairs, formula, rtol=1e-12, atol=1e-14)
