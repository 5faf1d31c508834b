"""What the ranks of a distributed test run; importable by name."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.compat import narrow_optimizer
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.data.packing import alignment
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.generation import SamplingConfig, megatron_engine
from megatron_irl.generation.engine import BuiltEngine
from megatron_irl.generation.graphs import LayerGraphs
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.data_parallel import build_ddp_config
from megatron_irl.objectives import irft_loss, sequence_logprobs
from megatron_irl.parallel.topology import initialize
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.scoring import rounded
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.batches import microbatches_for
from megatron_irl.train.optimizer import build_megatron_optimizer, reset_optimizer
from megatron_irl.train.step import Stepper
from megatron_irl.types import LossOutput, PackedBatch, Pair

Layout = dict[str, Any]
"""``ParallelConfig`` fields by name; the data-parallel size follows from the number of ranks."""

BETA = 0.1


def random_sequences(seed: int, num: int, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, response ids) of random lengths; some neighbours have one prompt."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocab, rng.integers(low, high)).astype(np.int32)

    sequences = [(ids(1, 20), ids(1, 16)) for _ in range(num)]
    for i in range(1, num, 3):
        sequences[i] = sequences[i - 1][0], sequences[i][1]
    return sequences


def make_pairs(seed: int, num: int, vocab: int) -> list[Pair]:
    """Random pairs of random lengths; the references are zero until somebody scores them."""
    demos = random_sequences(seed, num, vocab)
    samples = random_sequences(seed + 1, num, vocab)
    return [
        Pair(i, prompt, demo, sample, np.zeros(len(sample), np.float32), "stop",
             ref_demo_logp=0.0, ref_sample_logp=0.0)
        for i, ((prompt, demo), (_, sample)) in enumerate(zip(demos, samples, strict=True))
    ]


def objective(logprobs_R: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """The product's sigmoid IRFT loss."""
    logps_S = sequence_logprobs(logprobs_R, batch.segment_R, batch.num_sequences)
    return irft_loss(logps_S, batch.ref_logps_S, batch.lengths_S, beta=BETA)


def build(hf: str, layout: Layout, **options: Any) -> tuple[Any, list[Any], Any, Any]:
    """(topology, bare chunks with the folder's weights, TransformerConfig, Architecture)."""
    parallel = ParallelConfig(**layout)
    topology = initialize(parallel)
    arch = architecture(read_hf_config(Path(hf)))
    config = build_config(arch, parallel, **options)
    chunks = build_chunks(config, arch, topology)
    load_hf_weights(
        chunks, arch, Path(hf), tp_rank=topology.tp_rank, tp_size=topology.tp_size,
        ep_size=topology.ep_size,
    )
    return topology, chunks, config, arch


def build_trainer(
    hf: str, layout: Layout, optimizer: dict[str, Any], *, rows_at_once: int = 2048,
    overrides: dict[str, Any] | None = None, **ddp: Any,
) -> Stepper:
    """A stepper on DDP-wrapped chunks; ``optimizer`` holds Megatron's OptimizerConfig fields."""
    precision = "bf16" if optimizer.get("bf16") else "fp32"
    topology, chunks, config, arch = build(hf, layout, precision=precision, overrides=overrides)
    sharded = optimizer.get("optimizer", "adam") == "adam"
    policy = Policy(chunks, topology, arch, rows_at_once=rows_at_once).for_training(
        build_ddp_config({"use_distributed_optimizer": sharded} | ddp)
    )
    assert policy.multiple_of == multiple_of(layout)
    options = narrow_optimizer.config_of({
        "params_dtype": config.params_dtype, "weight_decay": 0.0,
        "use_distributed_optimizer": sharded, **optimizer,
    })
    return Stepper(policy, build_megatron_optimizer(options, policy.chunks, topology))


def multiple_of(layout: Layout) -> int:
    return alignment(
        layout.get("tensor_model_parallel_size", 1), layout.get("sequence_parallel", False)
    )


def write_bank(hf: str, folder: str, pairs: Sequence[Pair], seed: int, noise: float) -> None:
    """Commit pairs with references: those of the folder's weights, plus noise in nats."""
    topology, chunks, _, arch = build(hf, {})
    sequences = [(p.prompt_ids, ids) for p in pairs for ids in (p.demo_ids, p.sample_ids)]
    sums = rounded(Policy(chunks, topology, arch).score_sums(sequences).logp)
    shift = noise * np.random.default_rng(seed).standard_normal(len(sums))
    for i, pair in enumerate(pairs):
        pair.ref_demo_logp = sums[2 * i] + float(shift[2 * i])
        pair.ref_sample_logp = sums[2 * i + 1] + float(shift[2 * i + 1])
    PairBank(folder).write_part(0, 0, pairs)


def train_on_bank(
    hf: str, folder: str, layout: Layout, optimizer: dict[str, Any], steps: int,
    micro_batch_size: int = 2, rows_at_once: int = 2048, micro_batch_tokens: int | None = None,
    share_prompts: bool = True, overrides: dict[str, Any] | None = None,
) -> list[tuple[float, float]]:
    """Steps on the whole bank at once; (loss, gradient norm) of each, as this rank sees them."""
    stepper = build_trainer(hf, layout, optimizer, rows_at_once=rows_at_once, overrides=overrides)
    return _steps(stepper, folder, layout, steps, micro_batch_size, micro_batch_tokens,
                  share_prompts=share_prompts)


def token_logprobs(
    hf: str, layout: Layout, seed: int, num: int, vocab: int, max_tokens: int = 64
) -> list[list[float]]:
    """Response log-probabilities of ``random_sequences``, in several packs."""
    topology, chunks, _, arch = build(hf, layout)
    policy = Policy(chunks, topology, arch, rows_at_once=7)
    scores = policy.score(random_sequences(seed, num, vocab), max_tokens=max_tokens)
    return [score.tolist() for score in scores]


def steps_around_scoring(
    hf: str, folder: str, layout: Layout, optimizer: dict[str, Any], seed: int, vocab: int,
    **ddp: Any,
) -> tuple[list[tuple[float, float]], list[list[float]], list[int]]:
    """A step, a scoring of fewer packs than there are ranks, a step, a scoring of more packs.

    Returns:
        (loss, gradient norm) of the steps, all log-probabilities, and the progress shown.
    """
    stepper = build_trainer(hf, layout, optimizer, **ddp)
    numbers, scores, shown = [], [], []
    for num in (1, 24):
        numbers += _steps(stepper, folder, layout, 1)
        sequences = random_sequences(seed, num, vocab)
        scores += stepper.policy.score(sequences, max_tokens=24, on_progress=shown.append)
    return numbers, [score.tolist() for score in scores], shown


def generate(
    hf: str, layout: Layout, prompts: list[np.ndarray], sampling: dict[str, Any],
    budgets: list[int] | None = None, vocab: int = 128, burst_steps: int = 1,
) -> list[tuple[list[int], list[float], str]]:
    """(token ids, log-probabilities, finish reason) per prompt, as this rank sees them."""
    topology, chunks, _, _ = build(hf, layout)
    options = SamplingConfig(**sampling)
    longest = max(map(len, prompts)) + max(budgets or [options.max_new_tokens])
    with MegatronGenerator(
        chunks, topology, max_sequence_length=longest, vocab_size=vocab, max_requests=4,
        burst_steps=burst_steps,
    ) as generator:
        samples = generator.generate(prompts, options, max_new_tokens=budgets)
    return [(s.token_ids.tolist(), s.logprobs.tolist(), s.finish_reason) for s in samples]


def capture_fails_on_one(
    hf: str, layout: Layout, prompts: list[np.ndarray], vocab: int = 128
) -> tuple[list[list[int]], int, list[str]]:
    """Samples where the last rank of a replica cannot capture; graphs kept, and what is warned."""
    topology, chunks, _, _ = build(hf, layout)
    last = topology.groups.mp.rank() == topology.groups.mp.size() - 1
    build_engine = BuiltEngine._build

    def plant(self: BuiltEngine, graphs: int | None) -> Any:
        engine = build_engine(self, None)  # a CPU has no graphs
        if graphs is not None and last:
            raise torch.OutOfMemoryError("planted")
        return engine

    with (
        mock.patch.object(BuiltEngine, "_build", plant),
        mock.patch.object(megatron_engine, "why_not_captured", lambda *_: None),
        mock.patch.object(LayerGraphs, "lent", lambda _: nullcontext()),
        warnings.catch_warnings(record=True) as caught,
        MegatronGenerator(chunks, topology, max_sequence_length=64, vocab_size=vocab,
                          max_requests=4, cuda_graphs=3) as generator,
    ):
        warnings.simplefilter("always")
        samples = generator.generate(prompts, SamplingConfig(max_new_tokens=6, temperature=0.0))
        return ([s.token_ids.tolist() for s in samples], generator.graph_count,
                [str(w.message) for w in caught if "CUDA graphs" in str(w.message)])


def engine_and_trainer(
    hf: str, layout: Layout, prompts: list[np.ndarray], sampling: dict[str, Any], vocab: int = 128
) -> tuple[list[float], list[float]]:
    """Log-probabilities of the same sampled tokens by the engine and by the trainer.

    One module does both, as in a round, with one optimizer step before so that the weights are
    trained ones.
    """
    stepper = build_trainer(hf, layout, {"lr": 1e-3})
    topology, chunks = stepper.policy.topology, stepper.policy.chunks
    stepper.train_step(
        microbatches_for(make_pairs(5, 8, vocab), topology, micro_batch_size=2,
                         multiple_of=multiple_of(layout)),
        objective,
    )
    options = SamplingConfig(**sampling)
    longest = max(map(len, prompts)) + options.max_new_tokens
    with MegatronGenerator(
        chunks, topology, max_sequence_length=longest, vocab_size=vocab
    ) as generator:
        samples = generator.generate(prompts, options)
    pairs = [(p, s.token_ids) for p, s in zip(prompts, samples, strict=True)]
    trainer = np.concatenate(stepper.policy.score(pairs))
    return np.concatenate([s.logprobs for s in samples]).tolist(), trainer.tolist()


class _Schedule:
    """Stands where the learning-rate schedule goes; these trajectories have a constant one."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def train_and_save(
    hf: str, folder: str, layout: Layout, optimizer: dict[str, Any], steps: int, out: str
) -> list[tuple[float, float]]:
    """Train as ``train_on_bank`` does, then write a checkpoint."""
    stepper = build_trainer(hf, layout, optimizer)
    numbers = _steps(stepper, folder, layout, steps)
    checkpointer = Checkpointer(Path(out), stepper.policy.topology, keep=1)
    checkpointer.save(steps, stepper.policy.chunks, stepper.optimizer, _Schedule(), {"step": steps})
    return numbers


def resume_and_train(
    hf: str, folder: str, layout: Layout, optimizer: dict[str, Any], steps: int, out: str, at: int,
    forget: bool = False, save: bool = False,
) -> list[tuple[float, float]]:
    """Read a checkpoint and train on; ``forget`` leaves the optimizer as it was built.

    With ``save`` the last of the steps is saved in its turn, in the background.
    """
    stepper = build_trainer(hf, layout, optimizer)
    with torch.no_grad():  # what is not read back would show
        for parameter in (p for chunk in stepper.policy.chunks for p in chunk.parameters()):
            parameter.zero_()
    checkpointer = Checkpointer(Path(out), stepper.policy.topology, keep=1)
    state = checkpointer.load(at, stepper.policy.chunks, stepper.optimizer, _Schedule())
    assert state == {"step": at}
    if forget:
        reset_optimizer(stepper.optimizer)
    numbers = _steps(stepper, folder, layout, steps)
    if save:
        checkpointer.asynchronous = True
        state = {"step": at + steps}
        checkpointer.save(at + steps, stepper.policy.chunks, stepper.optimizer, _Schedule(), state)
        _steps(stepper, folder, layout, 1)  # what is being written must not see it
        checkpointer.wait()
    return numbers


def _steps(
    stepper: Stepper, folder: str, layout: Layout, steps: int, micro_batch_size: int = 2,
    micro_batch_tokens: int | None = None, share_prompts: bool = True,
) -> list[tuple[float, float]]:
    batches = microbatches_for(
        PairBank(folder).read_round(0), stepper.policy.topology, micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens, multiple_of=multiple_of(layout),
        share_prompts=share_prompts,
    )
    results = [stepper.train_step(batches, objective) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]
