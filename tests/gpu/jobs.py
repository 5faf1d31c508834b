"""What the ranks of a GPU test run; importable by name."""

import inspect
from contextlib import closing
from typing import Any

import numpy as np
import torch

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.policy.pipeline_sampling import PolicyGenerator
from megatron_irl.policy.policy import Policy
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer
from megatron_irl.train.step import Stepper
from tests.dist.jobs import Layout, build, make_pairs, objective, random_sequences

from megatron.core.optimizer import OptimizerConfig  # isort: skip

EOS = 1


def build_policy(
    hf: str, layout: Layout, precision: str, *, share_prompts: bool = True, **overrides: Any
) -> Policy:
    topology, chunks, _, arch = build(hf, layout, precision=precision, overrides=overrides)
    return Policy(chunks, topology, arch, share_prompts=share_prompts)


def train(
    hf: str, layout: Layout, precision: str, seed: int, steps: int = 3, vocab: int = 128,
    lr: float = 1e-3, share_prompts: bool = True, **overrides: Any,
) -> dict[str, Any]:
    """(loss, gradient norm) of steps on the same pairs, and log-probabilities before and after."""
    policy = build_policy(
        hf, layout, precision, share_prompts=share_prompts, **overrides
    ).for_training(build_ddp_config())
    config = policy.config
    optimizer = build_megatron_optimizer(
        OptimizerConfig(lr=lr, weight_decay=0.0, use_distributed_optimizer=True, bf16=config.bf16,
                        params_dtype=config.params_dtype),
        policy.chunks, policy.topology,
    )
    stepper = Stepper(policy, optimizer)
    sequences = random_sequences(seed + 7, 24, vocab)
    before = np.concatenate(policy.score(sequences))
    batches = microbatches_for(
        make_pairs(seed, 8, vocab), policy.topology, micro_batch_tokens=120,
        multiple_of=policy.multiple_of, share_prompts=share_prompts,
    )
    results = [stepper.train_step(batches, objective) for _ in range(steps)]
    return {"steps": [(r.loss, r.grad_norm) for r in results], "before": before.tolist(),
            "after": np.concatenate(policy.score(sequences)).tolist()}


def generate(
    hf: str, layout: Layout, precision: str, seed: int, temperature: float, budget: int = 16,
    vocab: int = 128, count: int = 12,
) -> dict[str, Any]:
    """Samples of a queue at 8 places, and the engine's and the trainer's log-probabilities of them.

    Budgets are unequal, so that prompts are taken up among requests that decode.
    """
    policy = build_policy(hf, layout, precision)
    prompts = [prompt for prompt, _ in random_sequences(seed, count, vocab)]
    budgets = np.random.default_rng(seed).integers(1, budget + 1, count).tolist()
    sampling = SamplingConfig(
        temperature=temperature, max_new_tokens=budget, eos_id=EOS, seed=seed
    )
    with MegatronGenerator(
        policy.chunks, policy.topology, max_sequence_length=64, vocab_size=vocab, max_requests=8
    ) as generator:
        samples = generator.generate(prompts, sampling, max_new_tokens=budgets)
    pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
    return {"ids": [s.token_ids.tolist() for s in samples],
            "engine": np.concatenate([s.logprobs for s in samples]).tolist(),
            "trainer": np.concatenate(policy.score(pairs)).tolist()}


def has_graphs() -> bool:
    """Whether the engine can be asked for CUDA graphs."""
    return "cuda_graphs" in inspect.signature(MegatronGenerator).parameters


def rounds_with_graphs(
    hf: str, layout: Layout, seed: int, rounds: int = 3, budget: int = 24, vocab: int = 128
) -> tuple[list[list[list[int]]], list[list[list[int]]], int]:
    """Samples of rounds with graphs and without, the weights moved in place between them.

    Returns:
        [round][prompt] token ids by captured steps and by eager ones, and the graphs captured.
    """
    policy = build_policy(hf, layout, "bf16")
    prompts = [prompt for prompt, _ in random_sequences(seed, 16, vocab)]
    options: dict[str, Any] = {
        "max_sequence_length": 64, "vocab_size": vocab, "max_requests": 16, "pipeline": "replicas",
    }
    captured, eager = (
        PolicyGenerator(policy.chunks, policy.topology, policy.architecture, cuda_graphs=graphs,
                        keep_cache="true", **options)
        for graphs in ("auto", "off")
    )
    outputs: tuple[list[Any], list[Any]] = ([], [])
    with closing(captured), closing(eager):
        for number in range(rounds):
            sampling = SamplingConfig(max_new_tokens=budget, eos_id=EOS, seed=seed + number)
            for generator, out in zip((captured, eager), outputs, strict=True):
                out.append([
                    s.token_ids.tolist() for s in generator.generate(prompts, sampling)
                ])
            _move(policy, seed + number)
        graphs = captured.graph_count
    return *outputs, graphs


def _move(policy: Policy, seed: int) -> None:
    """Change every weight where it lies, as an optimizer step does; equally on every run."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for chunk in policy.chunks for p in chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=generator, device="cuda")
            parameter.add_(0.02 * noise.to(parameter.dtype))
