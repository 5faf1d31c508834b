"""rft: an explicit reward from a head on the backbone, then a policy optimised against it.

arXiv 2405.17888, Algorithm 2. A round samples, takes ``reward_steps`` on r(demo) - r(sample),
scores the round once, and takes ``policy_steps`` on E[r] - beta * KL(pi || pi_ref). The steps
themselves are in ``rft_steps``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_irl.algorithms.base import Algorithm, Phase, Work
from megatron_irl.algorithms.rules import section, shown_beta
from megatron_irl.config.bounds import check_at_least_one, check_not_negative, check_range
from megatron_irl.config.run_files import HF_REWARD
from megatron_irl.config.schema import DataSource, Recipe
from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from megatron_irl.algorithms.round import Round
    from megatron_irl.parallel.topology import Topology
    from megatron_irl.policy.policy import Policy

LINEAR_BOUND = 5.0  # of the linear reward loss, where the recipe gives none


@dataclass(frozen=True)
class RftOptions:
    """rft's own keys of section ``algorithm``."""

    reward_steps: int = 8
    """rft only: optimizer steps a round on the reward. They are taken on frozen samples, so keep
    them few."""
    policy_steps: int = 8
    """rft only: optimizer steps a round on the policy; 0 learns a reward and leaves the policy."""


@dataclass(frozen=True)
class RewardConfig:
    """rft only: the explicit reward, a scalar head on the policy's backbone."""

    loss: Literal["logistic", "linear"] = "logistic"
    """-log sigmoid(r(demo) - r(sample)), or the theory's r(sample) - r(demo), which on frozen
    samples has no minimum and so needs ``bound``."""
    bound: float | None = None
    """linear only: a demonstration is not pushed above +bound nor a sample below -bound; none:
    5."""
    lr: float = 1e-4
    """Peak learning rate of the head, on the same schedule as ``optimizer.lr``."""
    trunk: Literal["joint", "detached"] = "joint"
    """``joint``: the reward's gradient also trains the backbone, which is the policy's, at
    ``optimizer.lr``. ``detached``: only the head learns, on features that the policy steps make;
    the policy is left alone by the reward steps."""
    trunk_scale: float = 1.0
    """joint only: factor on the gradient into the backbone. Adam rescales gradients by their
    recent size, so this weighs reward steps against policy steps (and the anchor), and not
    against ``optimizer.lr``."""
    mix_rounds: int = 0
    """Samples of so many earlier rounds are told from demonstrations as well. With 0, a policy that
    has caught up with the demonstrations leaves the reward nothing to learn but their noise."""
    preferences: tuple[str | DataSource, ...] = ()
    """Preference files ({"prompt", "chosen", "rejected"} records) as a second stream: every reward
    step takes ``train.global_batch_size`` of its pairs too."""
    preference_weight: float = 1.0
    """Weight of the preference stream's mean loss against the demonstrations' mean loss."""
    ledger: Literal["last", "every_round"] = "last"
    """Rounds whose ledger has the reward of every demonstration, as ``filter`` needs it: the last
    one, or each, at the price of a forward pass over all of ``data.train`` a round. Those that the
    round sampled for are in its ledger anyway."""


@dataclass(frozen=True)
class PolicyConfig:
    """rft only: policy optimisation of E[r] - beta * KL(pi || pi_ref).

    Ratios and the KL are those of the policy at temperature 1: where ``generation`` samples
    otherwise (temperature, top_p, top_k), they are off by that much.
    """

    samples_per_prompt: int = 4
    """Samples of each prompt, 2 or more: each one's baseline is the mean of the others."""
    clip_low: float = 0.2
    """A token's probability ratio against the sampling policy earns nothing below 1 - clip_low."""
    clip_high: float = 0.2
    """Nor above 1 + clip_high."""
    normalize: Literal["round", "none"] = "round"
    """``round``: rewards are divided by their standard deviation over the round's samples before
    the KL penalty is taken off, so that ``beta`` is in standard deviations per nat. ``none``: the
    rewards as the head gives them, as in the theory."""
    truncated: Literal["cap", "keep"] = "cap"
    """A sample that the length budget ended is not a response the reward was made for. ``cap``: it
    earns its own reward, but no more than the round's worst sample that ended by itself; ``keep``:
    its own reward."""


class Rft(Algorithm):
    """Rounds of generation, reward learning and policy optimisation."""

    name = "rft"
    options = RftOptions
    sections = {"reward": RewardConfig, "policy": PolicyConfig}
    unread = {
        "steps_per_round": "a round of rft has algorithm.reward_steps and algorithm.policy_steps. "
                           "Remove algorithm.steps_per_round.",
        "loss": "the explicit reward has reward.loss. Remove algorithm.loss.",
        "length_normalize": "it normalizes the implicit reward. Remove algorithm.length_normalize.",
    }
    filled = ("steps_per_round",)
    reward = "explicit"
    default_reference = "initial"
    preferences = "reward.preferences"

    def check(self, recipe: Recipe) -> None:
        """Refuse rewards and policy steps that cannot run."""
        check_at_least_one(recipe, ("algorithm.reward_steps",))
        check_not_negative(recipe, (
            "algorithm.policy_steps", "reward.lr", "reward.trunk_scale", "reward.mix_rounds",
            "reward.preference_weight"))
        _check_policy(recipe)
        _check_reward(recipe.reward)
        if recipe.ddp.get("overlap_grad_reduce") or recipe.ddp.get("overlap_param_gather"):
            raise UserError("ddp.overlap_grad_reduce conflicts with algorithm.name=rft; a reward "
                            "step has no gradient for the language-model head nor a policy step "
                            "for the reward head, and Megatron's overlapped reduction waits for "
                            "every gradient. Remove ddp.overlap_grad_reduce and "
                            "ddp.overlap_param_gather.")

    def round_size(self, recipe: Recipe, num_demonstrations: int) -> tuple[int, int]:
        """So many prompts that neither phase sees a sample twice, unless the recipe says."""
        algorithm = recipe.algorithm
        samples = max(algorithm.reward_steps, algorithm.policy_steps)
        samples *= recipe.train.global_batch_size
        steps = algorithm.reward_steps + algorithm.policy_steps
        return steps, algorithm.prompts_per_round or -(-samples // self.samples_per_prompt(recipe))

    def resolve(self, recipe: Recipe, num_demonstrations: int) -> Recipe:
        """As for all; a linear reward is bounded."""
        recipe = super().resolve(recipe, num_demonstrations)
        reward = recipe.reward
        if reward.loss == "linear" and reward.bound is None:
            reward = replace(reward, bound=LINEAR_BOUND)
        return replace(recipe, sections=recipe.sections | {"reward": reward})

    def samples_per_prompt(self, recipe: Recipe) -> int:
        """Two or more: a sample's baseline is the mean of the others."""
        return recipe.policy.samples_per_prompt

    def describe_steps(self, recipe: Recipe) -> str:
        """Both phases in words."""
        algorithm, batch = recipe.algorithm, recipe.train.global_batch_size
        return (f"{algorithm.reward_steps} reward steps of {batch} pairs and "
                f"{algorithm.policy_steps} policy steps of {batch} samples")

    def facts(self, recipe: Mapping[str, Any]) -> list[str]:
        """Of reward and policy, for the head of a report."""
        algorithm, reward = section(recipe, "algorithm"), section(recipe, "reward")
        return [f"{reward.get('loss')} reward loss", f"{reward.get('trunk')} trunk",
                f"{section(recipe, 'policy').get('samples_per_prompt')} samples a prompt",
                f"β {shown_beta(algorithm.get('beta'))}", f"reference {algorithm.get('reference')}"]

    def ln2_curve(self, recipe: Mapping[str, Any]) -> tuple[bool, str]:
        """The reward's loss; with an anchor or preferences it is only a part of the whole."""
        reward = section(recipe, "reward")
        is_sum = section(recipe, "algorithm").get("nll_coefficient") or reward.get("preferences")
        return reward.get("loss") == "logistic", "loss/reward" if is_sum else ""

    def attach_heads(self, recipe: Recipe, chunks: Sequence[Any], topology: "Topology") -> None:
        """The reward head, beside the language model's on the last stage."""
        from megatron_irl.model.reward_head import attach_reward_head

        reward = recipe.reward
        scale = 0.0 if reward.trunk == "detached" else reward.trunk_scale
        attach_reward_head(chunks, topology, trunk_scale=scale)

    def head_lr(self, recipe: Recipe) -> float:
        """The reward head is new, the policy is not: they learn at their own rates."""
        return recipe.reward.lr

    def phases(self, recipe: Recipe) -> list[Phase]:
        """Reward steps, then policy steps."""
        reward_steps = recipe.algorithm.reward_steps
        return [
            Phase("reward", 0, reward_steps, _learn_reward,
                  heads="both" if recipe.algorithm.nll_coefficient else "rewards"),
            Phase("policy", reward_steps, reward_steps + recipe.algorithm.policy_steps,
                  _optimize_policy, sequences_per_item=1),
        ]

    def export(self, policy: "Policy", run_folder: Path, companions: dict[str, Any],
               say: Callable[[str], None]) -> None:
        """The reward as a sequence classifier, in ``hf_reward/``."""
        from megatron_irl.algorithms.rft_steps import export_reward

        say(f"writing {run_folder / HF_REWARD}")
        export_reward(policy, run_folder / HF_REWARD, companions)


def _learn_reward(round: "Round", step: int) -> Work:
    from megatron_irl.algorithms.rft_steps import learn_reward

    del step
    return learn_reward(round)


def _optimize_policy(round: "Round", step: int) -> Work:
    from megatron_irl.algorithms.rft_steps import optimize_policy

    # A run that resumes within the phase finds the rewards in the bank: the weights are no longer
    # those that the rewards are to come from.
    return optimize_policy(round, score_first=step == round.recipe.algorithm.reward_steps)


def _check_policy(recipe: Recipe) -> None:
    policy = recipe.policy
    if policy.samples_per_prompt < 2:
        raise UserError(f"policy.samples_per_prompt={policy.samples_per_prompt} is below 2; a "
                        "sample's baseline is the mean of the others. Set "
                        "policy.samples_per_prompt to 2 or more.")
    if recipe.generation.temperature == 0:
        raise UserError("generation.temperature=0.0 conflicts with algorithm.name=rft; the samples "
                        "of a prompt would all be the same. Set generation.temperature above 0 "
                        "(the theory's is 1).")
    check_range("policy.clip_low", policy.clip_low, "(0, 1]", 0 < policy.clip_low <= 1)
    check_range("policy.clip_high", policy.clip_high, "(0, inf)", policy.clip_high > 0)


def _check_reward(reward: RewardConfig) -> None:
    if reward.bound is not None:
        check_range("reward.bound", reward.bound, "(0, inf)", reward.bound > 0)
        if reward.loss == "logistic":
            raise UserError(f"reward.bound={reward.bound} conflicts with reward.loss=logistic, "
                            "which flattens out by itself. Remove reward.bound, or set reward.loss "
                            "to linear.")
    if reward.trunk == "detached" and reward.trunk_scale != 1:
        raise UserError(f"reward.trunk_scale={reward.trunk_scale} conflicts with "
                        "reward.trunk=detached; no gradient goes into the backbone. Remove "
                        "reward.trunk_scale, or set reward.trunk to joint.")
    if not reward.preferences and reward.preference_weight != 1:
        raise UserError(f"reward.preference_weight={reward.preference_weight} weighs a stream that "
                        "is not there. Set reward.preferences to files, or remove "
                        "reward.preference_weight.")
