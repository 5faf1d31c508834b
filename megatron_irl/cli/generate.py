"""``megatron-irl generate``: responses to a file of prompts, committed chunk by chunk."""

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_irl.cli.inference import OpenModel, open_model, token_ids, with_ranks
from megatron_irl.console import Console
from megatron_irl.data.demonstrations import PromptRecord, load_prompts
from megatron_irl.errors import UserError
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.reduce import from_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.storage.commit import json_line
from megatron_irl.storage.partial import PartialJsonl
from megatron_irl.types import Sample


def run_generate(options: argparse.Namespace, argv: list[str]) -> int:
    """``megatron-irl generate``: one output line per prompt, in input order.

    Started again after a kill, it goes on from the lines it has finished.
    """
    for name in ("max_new_tokens", "chunk_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)} must be at least 1.")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} must be >= 0 and --top-p {options.top_p} in "
            "(0, 1]."
        )
    records = load_prompts(options.prompts)
    return with_ranks(options, argv, lambda: _generate(options, records))


def _generate(options: argparse.Namespace, records: list[PromptRecord]) -> None:
    model = open_model(options)
    prompts = [token_ids(r, model.tokenizer.render_prompt, r.prompt) for r in records]
    model.policy.open_generator(
        max_sequence_length=_longest(model, prompts, options.max_new_tokens)
    )
    sampling = SamplingConfig(
        temperature=options.temperature, top_p=options.top_p, top_k=0,
        max_new_tokens=options.max_new_tokens, seed=options.seed,
        eos_id=model.tokenizer.eos_id, stop_ids=model.tokenizer.stop_ids,
    )
    partial = None
    if model.topology.is_main:
        partial = PartialJsonl(options.out, _settings(options, model, records, prompts, sampling))
    try:
        _generate_rest(model, sampling, records, prompts, options.chunk_size, partial)
        if partial is not None:
            partial.finish()
    finally:
        if partial is not None:
            partial.close()


def _longest(model: OpenModel, prompts: Sequence[np.ndarray], max_new_tokens: int) -> int:
    """Most tokens of a prompt with its response; raises UserError if the model has no room."""
    longest, limit = max(map(len, prompts)), model.architecture.max_sequence_length
    if longest + max_new_tokens > limit:
        raise UserError(
            f"the longest prompt ({longest} tokens) plus --max-new-tokens {max_new_tokens} exceeds "
            f"the model's {limit} positions. Set --max-new-tokens lower or shorten the prompt."
        )
    return longest + max_new_tokens


def _generate_rest(
    model: OpenModel, sampling: SamplingConfig, records: Sequence[PromptRecord],
    prompts: Sequence[np.ndarray], chunk_size: int, partial: PartialJsonl | None,
) -> None:
    """Sample for the prompts not done yet, chunk by chunk; the main rank, with ``partial``, writes.

    A prompt's key is its place in the file, so neither the chunks nor where a kill fell changes a
    sample, and a resumed command may have another layout. Collective over every rank.
    """
    topology, count = model.topology, len(prompts)
    progress = Console(enabled=topology.is_main)
    start = _finished(partial, topology)
    if start:
        progress.note(f"resuming: {start} of {count} prompts are done")
    share = slice(topology.dp_rank, None, topology.dp_size)
    size = chunk_size * topology.dp_size
    finished = tokens = 0
    with progress.generation(len(range(start, count)[share])) as advance:
        for first in range(start, count, size):
            keys = range(first, min(first + size, count))
            samples = model.policy.generate(
                [prompts[key] for key in keys], sampling,
                functools.partial(_advance, advance, finished, tokens), keys=keys,
            )
            finished += len(keys[share])  # what is shown is this replica's share
            tokens += sum(len(sample.token_ids) for sample in samples[share])
            if partial is not None:
                partial.append(_line(model, records[key], sample)
                               for key, sample in zip(keys, samples, strict=True))


def _finished(partial: PartialJsonl | None, topology: Topology) -> int:
    """How many prompts are done: on every rank what the main rank reads, or its refusal."""
    found: int | str = 0
    if partial is not None:
        try:
            found = partial.begin()
        except UserError as error:
            found = str(error)
    found = from_main(found, topology)
    if isinstance(found, str):
        raise UserError(found)
    return found


def _advance(advance: Callable[..., None], finished: int, tokens: int, done: int, new: int) -> None:
    advance(finished + done, tokens + new)


def _line(model: OpenModel, record: PromptRecord, sample: Sample) -> dict[str, Any]:
    return record.record | {
        "response": model.tokenizer.decode(sample.token_ids),
        "token_ids": sample.token_ids.tolist(),
        "logprobs": sample.logprobs.astype(float).tolist(),
        "finish_reason": sample.finish_reason,
    }


def _settings(
    options: argparse.Namespace, model: OpenModel, records: Sequence[PromptRecord],
    prompts: Sequence[np.ndarray], sampling: SamplingConfig,
) -> dict[str, Any]:
    """What a line depends on; the ids are in it since the chat template may have changed."""
    digest = hashlib.sha256()
    for record, prompt in zip(records, prompts, strict=True):
        digest.update(json_line(record.record))
        digest.update(prompt.tobytes())
    return {
        "model": str(options.model.resolve()), "weights": model.weights,
        "precision": model.precision, "prompts": digest.hexdigest()[:16],
        **dataclasses.asdict(sampling),
    }
