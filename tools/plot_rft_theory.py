"""What RFT's objectives do where every response can be listed: figure and numbers of the docs.

    python tools/plot_rft_theory.py --out docs/rft_theory.svg

One prompt; a response is up to three tokens of {a, b, EOS}, fifteen in all. Expectations are sums
over all responses or pairs, in float64, with the product's own objectives inside; nothing here is
sampled. ``tests/unit/objectives/test_rft_theory.py`` asserts on the same functions.

Shape suffixes: Y listed responses, R their tokens laid end to end, K samples of a prompt.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_irl.objectives import (
    leave_one_out,
    policy_gradient_loss,
    reward_loss,
    sequence_logprobs,
)

EOS, MAX_TOKENS = 2, 3
RESPONSES = [
    response
    for length in range(1, MAX_TOKENS + 1)
    for response in itertools.product((0, 1, EOS), repeat=length)
    if EOS not in response[:-1] and (response[-1] == EOS or length == MAX_TOKENS)
]
PREFIXES = sorted({response[:i] for response in RESPONSES for i in range(len(response))})
NUM_RESPONSES = len(RESPONSES)
SEGMENT_R = torch.arange(NUM_RESPONSES).repeat_interleave(torch.tensor([len(y) for y in RESPONSES]))
_STATE_R = torch.tensor([PREFIXES.index(y[:i]) for y in RESPONSES for i in range(len(y))])
_TOKEN_R = torch.tensor([token for y in RESPONSES for token in y])

BETA = 0.5
STEP_SCALE = 2.0  # eta = STEP_SCALE / sqrt(T * K)
ROUNDS = (16, 64)
REWARD_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
SLOPE_ROUNDS = (16, 32, 64, 128, 256)
SLOPE_STEPS = (1, 4, 16)
PROBLEMS = 12


def distributions(seed: int, count: int) -> list[Tensor]:
    """Random [Y] distributions over the responses."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, NUM_RESPONSES, generator=generator, dtype=torch.float64)
    return list(logits.softmax(-1))


# The reward side: tabular responses, the exact policy ---------------------------------------------


def optimal_policy(ref_Y: Tensor, reward_Y: Tensor, beta: float = BETA) -> Tensor:
    """The policy that maximises E[r] - beta * KL(pi || pi_ref): pi_ref * exp(r / beta) / Z."""
    return (ref_Y.log() + reward_Y / beta).softmax(-1)


def expected_reward_gradient(
    reward_Y: Tensor, demo_Y: Tensor, sample_Y: Tensor, **options: Any
) -> Tensor:
    """[Y] d/dr of E over y ~ demo, z ~ sample of ``reward_loss``, all Y * Y pairs in one batch."""
    listed = torch.arange(NUM_RESPONSES)
    index_S = torch.cartesian_prod(listed, listed).flatten()  # demo, sample, demo, sample, ...
    rewards_S = reward_Y.detach()[index_S].requires_grad_()
    total = reward_loss(rewards_S, **{"loss": "linear", "bound": None, **options}).total
    (gradient_S,) = torch.autograd.grad(total, rewards_S)
    weight_S = torch.outer(demo_Y, sample_Y).flatten().repeat_interleave(2)
    return torch.zeros_like(reward_Y).index_add(0, index_S, gradient_S * weight_S)


def likelihood_gradient(demo_Y: Tensor, policy_Y: Tensor, beta: float = BETA) -> Tensor:
    """[Y] d/dr of E_demo[log pi_r], pi_r the optimal policy of r: (demo - policy) / beta."""
    return (demo_Y - policy_Y) / beta


def divergence(p_Y: Tensor, q_Y: Tensor) -> float:
    """KL(p || q) in nats."""
    return (p_Y * (p_Y / q_Y).log()).sum().item()


def alternate(
    demo_Y: Tensor, ref_Y: Tensor, *, rounds: int, reward_steps: int, step: float,
    beta: float = BETA,
) -> list[dict[str, float]]:
    """Algorithm 1 with exact expectations and the exact policy; one row per reward step.

    A round samples from the policy of its start and takes ``reward_steps`` ascent steps of
    ``step / beta`` on E[r(demo) - r(sample)]. Each row has the squared norm of the likelihood
    gradient at that step, the squared distance of the frozen-sample gradient from it (the bias),
    and KL(demo || policy) in nats.
    """
    reward_Y = torch.zeros_like(demo_Y)
    rows = []
    for _ in range(rounds):
        frozen_Y = optimal_policy(ref_Y, reward_Y, beta)
        for _ in range(reward_steps):
            policy_Y = optimal_policy(ref_Y, reward_Y, beta)
            used_Y = -expected_reward_gradient(reward_Y, demo_Y, frozen_Y) / beta
            true_Y = likelihood_gradient(demo_Y, policy_Y, beta)
            rows.append({
                "gradient": true_Y.square().sum().item(),
                "bias": (used_Y - true_Y).square().sum().item(),
                "kl": divergence(demo_Y, policy_Y),
            })
            reward_Y = reward_Y + step * used_Y
    return rows


def step_size(rounds: int, reward_steps: int) -> float:
    """The theory's: eta = c / sqrt(T * K)."""
    return STEP_SCALE / math.sqrt(rounds * reward_steps)


def first_round_bias(
    demo_Y: Tensor, ref_Y: Tensor, rounds: int, reward_steps: int
) -> tuple[float, float]:
    """Mean squared bias over the first of T rounds: measured, and derived to leading order.

    After k steps on frozen samples r has moved by k * eta * g, with g the first gradient, and the
    likelihood gradient by k * eta * J g / beta, with J = d pi / d r. The mean of its square over
    k < K is eta^2 (K - 1)(2K - 1) / 6 * |J g / beta|^2: about (eta * K)^2, hence K / T here.
    """
    step = step_size(rounds, reward_steps)
    rows = alternate(demo_Y, ref_Y, rounds=1, reward_steps=reward_steps, step=step)
    gradient_Y = likelihood_gradient(demo_Y, ref_Y)  # a run begins at r = 0, at the reference
    moved_Y = (ref_Y * gradient_Y - ref_Y * (ref_Y @ gradient_Y)) / BETA
    mean_square_k = (reward_steps - 1) * (2 * reward_steps - 1) / 6
    derived = step**2 * mean_square_k * (moved_Y / BETA).square().sum().item()
    return sum(row["bias"] for row in rows) / reward_steps, derived


def mean_gradient(demo_Y: Tensor, ref_Y: Tensor, rounds: int, reward_steps: int) -> float:
    """Mean squared likelihood gradient over all T * K steps of a run."""
    rows = alternate(demo_Y, ref_Y, rounds=rounds, reward_steps=reward_steps,
                     step=step_size(rounds, reward_steps))
    return sum(row["gradient"] for row in rows) / len(rows)


def convergence_slopes(
    reward_steps: int, rounds: Sequence[int], problems: int
) -> dict[str, list[float]]:
    """Slope of log |grad L|^2 in log(T * K) over ``rounds`` at one K, least squares, a problem.

    Returns:
        Slopes of the ``mean`` over all steps of a run, and of the theory's ``min``.
    """
    steps = torch.tensor(rounds, dtype=torch.float64).mul(reward_steps).log()
    centred = steps - steps.mean()
    slopes: dict[str, list[float]] = {"mean": [], "min": []}
    for seed in range(problems):
        demo_Y, ref_Y = distributions(seed, 2)
        heights = torch.tensor([
            [sum(gradients) / len(gradients), min(gradients)] for gradients in (
                [row["gradient"] for row in alternate(
                    demo_Y, ref_Y, rounds=t, reward_steps=reward_steps,
                    step=step_size(t, reward_steps))] for t in rounds)
        ], dtype=torch.float64).log()
        for values, slope in zip(slopes.values(), centred @ heights, strict=True):
            values.append((slope / centred.square().sum()).item())
    return slopes


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 % quantiles of the mean under resampling."""
    generator = torch.Generator().manual_seed(0)
    every = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (10_000, len(values)), generator=generator)
    low, high = every[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return every.mean().item(), low.item(), high.item()


def print_slopes() -> None:
    """Print how fast the mean and the smallest squared gradient fall as T grows, for several K."""
    print(f"slope of log |grad L|^2 in log TK, T = {SLOPE_ROUNDS}, {PROBLEMS} problems, 95 %")
    for k in SLOPE_STEPS:
        said = []
        for measure, slopes in convergence_slopes(k, SLOPE_ROUNDS, PROBLEMS).items():
            mean, low, high = interval(slopes)
            said.append(f"{measure} {mean:6.2f} [{low:6.2f}, {high:6.2f}]")
        print(f"K = {k:3d}: " + "; ".join(said))


# The policy side: an autoregressive policy, a logit for each (prefix, token) ----------------------


def token_logprobs(logits: Tensor) -> Tensor:
    """[R] log-probability of every token of every listed response; logits [prefixes, 3]."""
    return logits.log_softmax(-1)[_STATE_R, _TOKEN_R]


def response_logprobs(logits: Tensor) -> Tensor:
    """[Y] log-probability of every listed response."""
    return sequence_logprobs(token_logprobs(logits), SEGMENT_R, NUM_RESPONSES)


def shaped_rewards(logits: Tensor, reward_Y: Tensor, ref_Y: Tensor) -> Tensor:
    """[Y] r - beta * (log pi - log pi_ref), constants as when sampled."""
    return reward_Y - BETA * (response_logprobs(logits.detach()) - ref_Y.log())


def exact_policy_gradient(logits: Tensor, reward_Y: Tensor, ref_Y: Tensor) -> Tensor:
    """d/d logits of E_pi[r] - beta * KL(pi || pi_ref), by differentiating the sum itself."""
    logits = logits.detach().requires_grad_()
    log_policy_Y = response_logprobs(logits)
    objective = (log_policy_Y.exp() * (reward_Y - BETA * (log_policy_Y - ref_Y.log()))).sum()
    return torch.autograd.grad(objective, logits)[0]


def estimated_policy_gradient(logits: Tensor, index_PK: Tensor, advantages_PK: Tensor) -> Tensor:
    """Ascent direction of ``policy_gradient_loss`` on responses by number, mean over samples."""
    logits = logits.detach().requires_grad_()
    parts = torch.split(token_logprobs(logits), [len(y) for y in RESPONSES])
    chosen = [parts[i] for i in index_PK.flatten().tolist()]
    logprobs_R = torch.cat(chosen)
    segment_R = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(c) for c in chosen]))
    out = policy_gradient_loss(logprobs_R, logprobs_R.detach(), advantages_PK.flatten(), segment_R,
                               len(chosen), clip_low=0.2, clip_high=0.2)
    return -torch.autograd.grad(out.total, logits)[0] / out.weight


def estimator_moments(
    logits: Tensor, reward_Y: Tensor, ref_Y: Tensor, num_samples: int, *, baseline: bool
) -> tuple[Tensor, float]:
    """Mean and total variance of the estimator over all Y^K draws of K samples of the prompt.

    At ratio 1 the estimate is linear in the advantages, so the gradient of each response alone
    (with advantage 1) is enough to list them all.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    scores_Y = torch.stack([
        estimated_policy_gradient(logits, torch.tensor([[i]]), one) for i in range(NUM_RESPONSES)
    ]).flatten(1)
    index_DK = torch.cartesian_prod(*[torch.arange(NUM_RESPONSES)] * num_samples)
    probability_D = response_logprobs(logits)[index_DK].sum(1).exp()
    rewards_DK = shaped_rewards(logits, reward_Y, ref_Y)[index_DK]
    advantages_DK = leave_one_out(rewards_DK) if baseline else rewards_DK
    estimates_D = torch.einsum("dk,dkx->dx", advantages_DK, scores_Y[index_DK]) / num_samples
    mean = probability_D @ estimates_D
    variance = (probability_D @ (estimates_D - mean).square()).sum().item()
    return mean.view_as(logits), variance


def policy_toy(seed: int, level: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (logits, rewards around ``level``, reference); the policy is not the reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ref_Y = response_logprobs(normal(len(PREFIXES), 3)).exp()
    return normal(len(PREFIXES), 3), level + normal(NUM_RESPONSES), ref_Y


# Figure and table ---------------------------------------------------------------------------------


def draw(out: Path, seed: int = 0) -> None:
    """Compute everything, print the numbers, write the figure."""
    import matplotlib
    from matplotlib.figure import Figure

    demo_Y, ref_Y = distributions(seed, 2)
    matplotlib.rcParams.update({"svg.hashsalt": "rft", "svg.fonttype": "none", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(11, 3.1), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    rows = alternate(demo_Y, ref_Y, rounds=600, reward_steps=1, step=1.0)
    print(f"K=1, eta=1, {len(rows)} rounds: KL(demo || policy) {rows[0]['kl']:.3f} -> "
          f"{rows[-1]['kl']:.1e} nats, |grad L|^2 {rows[0]['gradient']:.3f} -> "
          f"{rows[-1]['gradient']:.1e}")
    left.semilogy([row["kl"] for row in rows], label="KL(demo ‖ policy), nats")
    left.semilogy([row["gradient"] for row in rows], label="|∇L|²")
    left.set(xlabel="round", title="Fresh samples, exact policy", ylim=(1e-14, None))
    left.legend(frameon=False)
    print("  T    K   bias, round 1  leading order  mean |grad L|^2")
    for rounds in ROUNDS:
        biases = [first_round_bias(demo_Y, ref_Y, rounds, k) for k in REWARD_STEPS]
        gradients = [mean_gradient(demo_Y, ref_Y, rounds, k) for k in REWARD_STEPS]
        for k, (bias, derived), gradient in zip(REWARD_STEPS, biases, gradients, strict=True):
            print(f"{rounds:3d}  {k:3d}  {bias:13.2e}  {derived:13.2e}  {gradient:15.2e}")
        ratios = [k / rounds for k in REWARD_STEPS[1:]]  # at K = 1 there is no bias to draw
        (line,) = middle.loglog(ratios, [bias for bias, _ in biases[1:]], "o",
                                label=f"T = {rounds}")
        middle.loglog(ratios, [derived for _, derived in biases[1:]], "--",
                      color=line.get_color(), linewidth=0.8)
        right.loglog(REWARD_STEPS, gradients, "o-", label=f"T = {rounds}")
    middle.set(xlabel="K / T", title="Squared bias in round 1 (dashed: leading order)")
    right.set(xlabel="K", title="Mean |∇L|² over the run, η = 2 / √(TK)")
    for axes in (middle, right):
        axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})
    print_slopes()
    print_variances()


def print_variances() -> None:
    """Print variance of plain REINFORCE over that of leave-one-out, for rewards of three levels."""
    print("variance of REINFORCE / variance of leave-one-out, one prompt")
    print("reward level   K=2    K=3    K=4")
    for level in (0.0, 2.0, 8.0):
        logits, reward_Y, ref_Y = policy_toy(0, level)
        ratios = [
            estimator_moments(logits, reward_Y, ref_Y, k, baseline=False)[1]
            / estimator_moments(logits, reward_Y, ref_Y, k, baseline=True)[1]
            for k in (2, 3, 4)
        ]
        print(f"{level:12.1f}  " + "  ".join(f"{ratio:5.2f}" for ratio in ratios))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Figure and numbers of docs/rft_theory.md.")
    parser.add_argument("--out", type=Path, default=Path("docs/rft_theory.svg"))
    draw(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
