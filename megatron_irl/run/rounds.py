"""The start of a round: sample from the policy, cache the reference, commit both to the bank."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.convert.load import load_hf_weights
from megatron_irl.data.pair_bank import PairBank, chunk_seed
from megatron_irl.data.sampler import OrderedSampler
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.reduce import from_main, gather_in_turn
from megatron_irl.policy.scoring import score_sequences, summed
from megatron_irl.run.session import Session
from megatron_irl.storage.commit import replacing
from megatron_irl.train.batches import Sequences
from megatron_irl.types import Demonstration, Pair, Sample

_HELDOUT_STREAM = 1 << 20  # keeps held-out sampling seeds apart from those of training chunks


def round_demonstrations(session: Session, round_index: int) -> list[Demonstration]:
    """The demonstrations of a round: disjoint slices of one shuffle, epoch after epoch."""
    size = session.recipe.algorithm.prompts_per_round
    assert size is not None, "the recipe must be resolved"
    sampler = OrderedSampler(len(session.demonstrations), session.recipe.seed)
    sampler.load_state_dict({"position": round_index * size})
    return [session.demonstrations[i] for i in sampler.take(size)]


def fill_bank(session: Session, round_index: int) -> dict[str, Any]:
    """Bring the round's pairs and references on disk, whatever part of them is there already.

    Returns:
        What generation and the mismatch measurement found, kept beside the pairs so that a
        resumed run reports the same.

    Collectives: every rank must call. The folder must be one that all ranks see.
    """
    summary_path = session.folder.pairs / f"round_{round_index:04d}" / "summary.json"
    known = _read_json(summary_path) if session.topology.is_main else None
    known = from_main(known, session.topology)
    if known is not None:
        return known
    demonstrations = round_demonstrations(session, round_index)
    generation = sample_pairs(
        session, session.bank, round_index, demonstrations,
        samples_per_prompt=session.samples_per_prompt,
    )
    references = add_references(session, session.bank, round_index)
    summary = {"generation": generation, **references}
    if session.topology.is_main:
        with replacing(summary_path) as file:
            file.write(json.dumps(summary).encode())
    session.topology.barrier()
    return summary


def previous_pairs(session: Session, round_index: int) -> list[Pair]:
    """The pairs of the round before, with reference log-probabilities of this round's policy.

    They are kept in a bank of their own: those in the run's bank belong to the round before.
    Collectives: every rank must call, before the round's first update.
    """
    bank, is_main = session.previous_bank, session.topology.is_main
    if not from_main(is_main and bank.has_references(round_index), session.topology):
        if is_main:
            for chunk in session.bank.complete_chunks(round_index - 1):
                pairs = session.bank.read_chunk(round_index - 1, chunk)
                for pair in pairs:  # so that a run killed before the pass below repeats it
                    pair.ref_demo_logp = pair.ref_sample_logp = None
                bank.write_chunk(round_index, chunk, pairs)
        session.topology.barrier()
        add_references(session, bank, round_index)
    return bank.read_round(round_index)


def sample_pairs(
    session: Session, bank: PairBank, round_index: int, demonstrations: Sequence[Demonstration],
    *, samples_per_prompt: int = 1,
) -> dict[str, Any]:
    """Sample responses to every prompt and commit the pairs, chunk by chunk; skips done chunks.

    The samples of a prompt follow each other, each as a pair with the prompt's demonstration.

    The seed of a chunk derives from (run seed, round, chunk), so an interrupted generation goes
    on to the samples it would have drawn. Collectives: every rank must call.
    """
    topology, size = session.topology, session.recipe.generation.chunk_size
    parts = [
        [d for d in demonstrations[first : first + size] for _ in range(samples_per_prompt)]
        for first in range(0, len(demonstrations), size)
    ]
    done = from_main(
        bank.keep_chunks_of(round_index, parts) if topology.is_main else None, topology
    )
    stream = _HELDOUT_STREAM if bank is session.heldout_bank else 0
    tokens, start = 0, time.perf_counter()
    with session.timed("generation"):
        for chunk, part in enumerate(parts):
            if chunk in done:
                continue
            seed = chunk_seed(session.recipe.seed, round_index, stream + chunk)
            samples = generate(session, [d.prompt_ids for d in part], seed=seed)
            tokens += sum(len(sample.token_ids) for sample in samples)
            if topology.is_main:
                pairs = [_pair(d, s, round_index) for d, s in zip(part, samples, strict=True)]
                bank.write_chunk(round_index, chunk, pairs)
        session.generator.close()  # the KV cache goes before optimisation
        topology.barrier()
    seconds = time.perf_counter() - start
    return {
        "samples": samples_per_prompt * len(demonstrations), "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
    }


def generate(
    session: Session, prompts: Sequence[np.ndarray], *, seed: int, temperature: float | None = None
) -> list[Sample]:
    """Generate for every prompt, split over data parallelism; all samples on every rank."""
    options, topology = session.recipe.generation, session.topology
    assert options.max_new_tokens is not None
    sampling = SamplingConfig(
        temperature=options.temperature if temperature is None else temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        seed=seed,
        eos_id=session.tokenizer.eos_id,
        stop_ids=session.tokenizer.stop_ids,
    )
    share = slice(topology.dp_rank, None, topology.dp_size)
    mine, keys = list(prompts[share]), range(len(prompts))[share]
    with session.progress.generation(len(mine)) as advance:
        samples = session.generator.generate(mine, sampling, advance, keys=keys)
    return gather_in_turn(samples, topology)


def add_references(session: Session, bank: PairBank, round_index: int) -> dict[str, Any]:
    """One evaluation-mode pass stores every pair's reference log-probabilities in the bank.

    With ``reference: round_start`` the pass runs on the policy itself, before its first update,
    and doubles as the engine-trainer mismatch measurement. With ``initial`` the weights the run
    began with are swapped in for the pass. Collectives: every rank must call.
    """
    topology = session.topology
    chunks = from_main(bank.complete_chunks(round_index) if topology.is_main else None, topology)
    mismatch = _Mismatch()
    with session.timed("reference"):
        initial = session.recipe.algorithm.reference == "initial" and session.state.step > 0
        if initial:  # the policy's own pass, on one chunk, for the mismatch
            mismatch.add(*_score_pairs(session, bank.read_chunk(round_index, chunks[0])))
        with initial_weights(session) if initial else _as_they_are():
            for chunk in chunks:
                pairs = bank.read_chunk(round_index, chunk)
                pairs, scores = _score_pairs(session, pairs)
                if not initial:
                    mismatch.add(pairs, scores)
                sums = summed(scores)
                for i, pair in enumerate(pairs):
                    pair.ref_demo_logp, pair.ref_sample_logp = sums[2 * i], sums[2 * i + 1]
                if topology.is_main:
                    bank.write_chunk(round_index, chunk, pairs)
        topology.barrier()
    return {"mismatch": mismatch.summary()}


def score_distinct[T](pairs: Sequence[Pair], score: Callable[[Sequences], list[T]]) -> list[T]:
    """The scores of [demo_0, sample_0, demo_1, ...]; a repeated demonstration is scored once.

    An empty sample has no rows to score; its demonstration stands in, and the pair is never
    trained on.
    """
    sequences: Sequences = []
    wanted: list[int] = []
    demo_at: dict[int, int] = {}
    for pair in pairs:
        if pair.ordinal not in demo_at:
            demo_at[pair.ordinal] = len(sequences)
            sequences.append((pair.prompt_ids, pair.demo_ids))
        wanted += [demo_at[pair.ordinal], len(sequences)]
        sample = pair.sample_ids if len(pair.sample_ids) else pair.demo_ids
        sequences.append((pair.prompt_ids, sample))
    scores = score(sequences)
    return [scores[i] for i in wanted]


@contextmanager
def initial_weights(session: Session) -> Iterator[None]:
    """Swap in the weights the run began with, and the policy's back afterwards.

    The policy's weights are set aside in memory for this one pass; during optimisation there is
    no second copy. Collectives: none beyond reading the HF folder on every rank.
    """
    parameters = [p for chunk in session.chunks for p in chunk.parameters()]
    with torch.no_grad():
        aside = [p.detach().clone() for p in parameters]
        load_hf_weights(
            session.chunks, session.architecture, Path(session.recipe.model.hf),
            tp_rank=session.topology.tp_rank, tp_size=session.topology.tp_size,
        )
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, saved in zip(parameters, aside, strict=True):
                parameter.copy_(saved)
        del aside
        hardware.release_cached_memory()


@contextmanager
def _as_they_are() -> Iterator[None]:
    yield


def _score_pairs(session: Session, pairs: list[Pair]) -> tuple[list[Pair], list[np.ndarray]]:
    def score(sequences: Sequences) -> list[np.ndarray]:
        with session.progress.reference(len(sequences)) as advance:
            return score_sequences(
                session.stepper, sequences, multiple_of=session.multiple_of, on_progress=advance
            )

    return pairs, score_distinct(pairs, score)


class _Mismatch:
    """Difference of the engine's and the trainer's log-probability of every sampled token."""

    def __init__(self) -> None:
        self.differences: list[np.ndarray] = []

    def add(self, pairs: Sequence[Pair], scores: Sequence[np.ndarray]) -> None:
        for pair, trainer in zip(pairs, scores[1::2], strict=True):
            if len(pair.sample_ids):
                self.differences.append(pair.sample_logprobs.astype(np.float64) - trainer)

    def summary(self) -> dict[str, float]:
        """``kl`` estimates KL(engine || trainer) per token from the engine's own samples."""
        if not self.differences:
            return {}
        difference = np.concatenate(self.differences)
        return {
            "mean_abs": float(np.abs(difference).mean()),
            "max_abs": float(np.abs(difference).max()),
            "kl": float(difference.mean()),
        }


def _pair(demonstration: Demonstration, sample: Sample, round_index: int) -> Pair:
    return Pair(
        ordinal=demonstration.ordinal,
        prompt_ids=demonstration.prompt_ids,
        demo_ids=demonstration.response_ids,
        sample_ids=sample.token_ids,
        sample_logprobs=sample.logprobs,
        finish_reason=sample.finish_reason,
        round=round_index,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None
