"""What the ranks of the reward head's distributed tests run; importable by name."""

from typing import Any

import numpy as np
import torch

from megatron_irl.algorithms.advantages import RolloutRows, advantages
from megatron_irl.algorithms.rft import PolicyConfig
from megatron_irl.algorithms.rft_objectives import policy_objective, reward_objective
from megatron_irl.config import Recipe, recipe_from_mapping, resolve
from megatron_irl.data.pair_index import index_of
from megatron_irl.data.preferences import Preference
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.model.reward_head import attach_reward_head, reward_head
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer, reward_head_group
from megatron_irl.train.step import Stepper
from megatron_irl.types import Pair, Rollout
from tests.dist.jobs import Layout, build, make_pairs, multiple_of, random_sequences

from megatron.core.optimizer import (  # isort: skip
    OptimizerConfig,
    get_standard_config_overrides,
)

HEAD_LR, LR = 0.02, 0.05


def head_weight(seed: int, hidden: int) -> np.ndarray:
    """float32 [1, H]; of a trained head's size."""
    return np.random.default_rng(seed).standard_normal((1, hidden)).astype(np.float32) / 8


def make_rollouts(seed: int, num: int, vocab: int) -> list[Rollout]:
    """Random samples whose sampling log-probabilities are far enough off for some to be clipped."""
    rng = np.random.default_rng(seed)
    return [
        Rollout(prompt, ids, rng.normal(-3, 2, len(ids)).astype(np.float32), -10.0, rng.normal())
        for prompt, ids in random_sequences(seed, num, vocab)
    ]


def make_preferences(seed: int, num: int, vocab: int) -> list[Preference]:
    return [
        Preference(prompt_ids=p.prompt_ids, chosen_ids=p.demo_ids, rejected_ids=p.sample_ids,
                   source=f"p:{p.ordinal}")
        for p in make_pairs(seed, num, vocab)
    ]


def build_rft(
    hf: str, layout: Layout, seed: int, optimizer: dict[str, Any], *, trunk_scale: float = 1.0,
    precision: Any = "fp32",
) -> Stepper:
    """A stepper on chunks with a reward head of seeded weights, in a parameter group of its own."""
    topology, chunks, config, arch = build(hf, layout, precision=precision)
    attach_reward_head(chunks, topology, trunk_scale=trunk_scale)
    head = reward_head(chunks)
    assert (head is not None) == topology.is_last_stage
    if head is not None:
        assert not head.weight.any()
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(head_weight(seed, config.hidden_size)))
    sharded = optimizer.get("optimizer", "adam") == "adam"
    policy = Policy(chunks, topology, arch).for_training(
        build_ddp_config({"use_distributed_optimizer": sharded})
    )
    options = OptimizerConfig(
        lr=LR, bf16=config.bf16, params_dtype=config.params_dtype, weight_decay=0.0,
        use_distributed_optimizer=sharded, **optimizer,
    )
    built = build_megatron_optimizer(
        options, policy.chunks, topology,
        overrides=get_standard_config_overrides(options) | reward_head_group(HEAD_LR),
    )
    for group in built.param_groups:
        group["lr"] = group["max_lr"]  # what the schedule does
    return Stepper(policy, built)


def rft_recipe(**reward: Any) -> Recipe:
    """A recipe whose reward and policy sections the objectives read."""
    nll = reward.pop("nll_coefficient", 0.0)
    recipe = recipe_from_mapping({
        "model": {"hf": "x"}, "data": {"train": "y"}, "output_dir": "z", "reward": reward,
        "algorithm": {"name": "rft", "nll_coefficient": nll},
    })
    return resolve(recipe, 8)


def train_rft(
    hf: str, layout: Layout, seed: int, optimizer: dict[str, Any], vocab: int = 128,
    num: int = 8, trunk_scale: float = 1.0, micro_batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Scores, a reward step, an anchored one with preferences, a policy step, and scores again."""
    stepper = build_rft(hf, layout, seed, optimizer, trunk_scale=trunk_scale)
    pairs, rollouts = make_pairs(seed, num, vocab), make_rollouts(seed + 2, num, vocab)
    preferences = make_preferences(seed + 3, num, vocab)

    def batches(items: Any) -> Any:
        return microbatches_for(
            items, stepper.policy.topology, micro_batch_size=2,
            micro_batch_tokens=micro_batch_tokens, multiple_of=multiple_of(layout),
        )

    def scores() -> list[float]:
        sequences = [(p.prompt_ids, p.demo_ids) for p in pairs]
        return stepper.policy.score_rewards(sequences, max_tokens=64)

    before = scores()
    plain, heads = reward_objective(rft_recipe())
    assert heads == "rewards"
    results = [stepper.train_step(batches(pairs), plain, heads=heads)]
    anchored, heads = reward_objective(
        rft_recipe(loss="linear", bound=0.3, nll_coefficient=0.1, preferences=["q"],
                   preference_weight=0.5)
    )
    assert heads == "both"
    results.append(
        stepper.train_step(batches(pairs) + batches(preferences), anchored, heads=heads)
    )
    results.append(
        stepper.train_step(batches(rollouts), policy_objective(rft_recipe()), frozen="reward_head")
    )
    return {
        "before": before, "after": scores(),
        "steps": [(r.loss, r.grad_norm) for r in results],
        "metrics": [r.metrics for r in results],
    }


def moved(
    hf: str, layout: Layout, seed: int, frozen: Any, heads: str, trunk_scale: float
) -> tuple[bool, bool]:
    """Whether the trunk and the head move in a third step, after two steps gave Adam momentum."""
    stepper = build_rft(hf, layout, seed, {}, trunk_scale=trunk_scale)
    pairs = make_pairs(seed, 4, 128)
    batches = microbatches_for(pairs, stepper.policy.topology, micro_batch_size=2,
                               multiple_of=multiple_of(layout))
    anchored, _ = reward_objective(rft_recipe(nll_coefficient=1.0))
    for _ in range(2):
        stepper.train_step(batches, anchored, heads="both")

    def snapshot() -> list[np.ndarray]:
        named = [(n, p) for c in stepper.policy.chunks for n, p in c.named_parameters()]
        return [
            np.concatenate([np.zeros(0)] + [
                p.detach().numpy().ravel() for n, p in named if ("reward_head" in n) == is_head
            ])
            for is_head in (False, True)
        ]

    before = snapshot()
    plain, _ = reward_objective(rft_recipe())
    objective = plain if heads == "rewards" else policy_objective(rft_recipe())
    items: Any = pairs if heads == "rewards" else make_rollouts(seed, 4, 128)
    batches = microbatches_for(items, stepper.policy.topology, micro_batch_size=2,
                               multiple_of=multiple_of(layout))
    stepper.train_step(batches, objective, heads=heads, frozen=frozen)  # type: ignore[arg-type]
    trunk, head = (not np.array_equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    return trunk, head


def half_precision(hf: str, layout: Layout, seed: int) -> dict[str, Any]:
    """Dtypes of trunk and head in a bf16 model, and two reward steps of it."""
    stepper = build_rft(hf, layout, seed, {}, precision="bf16")
    batches = microbatches_for(
        make_pairs(seed, 4, 128), stepper.policy.topology, micro_batch_size=2,
        multiple_of=multiple_of(layout),
    )
    objective, heads = reward_objective(rft_recipe())
    losses = [stepper.train_step(batches, objective, heads=heads).loss for _ in range(2)]
    head = reward_head(stepper.policy.chunks)
    named = [(n, p) for c in stepper.policy.chunks for n, p in c.named_parameters()]
    return {
        "losses": losses,
        "trunk": {str(p.dtype) for n, p in named if "reward_head" not in n},
        "head": None if head is None else str(head.weight.dtype),
        "moved": None if head is None else float(
            (head.weight - torch.from_numpy(head_weight(seed, head.weight.shape[1]))).abs().max()
        ),
    }


def reward_of_a_quarter(hf: str, layout: Layout, seed: int, rounds: int) -> list[float]:
    """Share of a quarter of the vocabulary in fresh samples, before each round on that reward.

    Responses are of one token, so that a few rounds suffice.
    """
    stepper = build_rft(hf, layout, seed, {})
    for group in stepper.optimizer.param_groups:
        group["lr"] = 3e-3
    prompts = [np.array([p], np.int32) for p in range(10, 18)]
    options = PolicyConfig(samples_per_prompt=16)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 1, "eos_id": 1}
    means = []
    with MegatronGenerator(
        stepper.policy.chunks, stepper.policy.topology, max_sequence_length=2, vocab_size=128
    ) as generator:
        for number in range(rounds):
            repeated = [prompt for prompt in prompts for _ in range(options.samples_per_prompt)]
            samples = generator.generate(repeated, SamplingConfig(seed=seed + number, **sampling))
            pairs = [
                Pair(i, prompt, prompt, s.token_ids, s.logprobs, s.finish_reason,
                     ref_sample_logp=float(s.logprobs.sum()), reward_demo=0.0,
                     reward_sample=float((s.token_ids % 4 == 2).mean()))
                for i, (prompt, s) in enumerate(zip(repeated, samples, strict=True))
            ]
            means.append(float(np.mean([pair.reward_sample for pair in pairs])))
            batches = microbatches_for(
                list(RolloutRows(pairs, advantages(index_of(pairs), options, beta=0.0))),
                stepper.policy.topology, micro_batch_size=64,
                multiple_of=multiple_of(layout),
            )
            for _ in range(4):
                stepper.train_step(batches, policy_objective(rft_recipe()), frozen="reward_head")
    return means
