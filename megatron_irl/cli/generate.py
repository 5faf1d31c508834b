"""``megatron-irl generate``: responses to a file of prompts, committed part by part."""

import argparse
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_irl.cli.encoding import prompt_ids
from megatron_irl.cli.inference import OpenModel, open_model, with_ranks
from megatron_irl.cli.outputs import check_one_kind, check_out, reading_of, say_what_was_read
from megatron_irl.console import Console
from megatron_irl.data.prompts import PromptRecord, load_prompts
from megatron_irl.data.sources import Reading
from megatron_irl.errors import UserError
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.generation.stop_texts import StopTexts
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.policy.pairs import ranks
from megatron_irl.storage.commit import json_line
from megatron_irl.storage.partial import PartialJsonl
from megatron_irl.types import Sample

PART = 1024  # lines per replica between two writes
STREAM_PART = 64  # likewise where someone is waiting for what other replicas sample


def run_generate(options: argparse.Namespace, argv: list[str]) -> int:
    """``megatron-irl generate``: one output line per prompt, in input order.

    Started again after a kill, it goes on from the lines it has finished.
    """
    for name in ("max_new_tokens", "part_size", "num_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} must be at least 1.")
    if "" in options.stop:
        raise UserError("--stop '' would end every response at once; give some text.")
    if options.num_samples > 1 and options.temperature == 0:
        raise UserError(f"--num-samples {options.num_samples} conflicts with --temperature 0; all "
                        "samples of a prompt would be the same. Set --temperature above 0.")
    check_out(options.out, options.overwrite)
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature} must be >= 0 and --top-p {options.top_p} in "
            "(0, 1]."
        )
    reading = reading_of(options, "--prompts", options.prompts)
    records = load_prompts(reading)
    if options.system is not None:
        records = _with_system(records, options.system)
    check_one_kind(options.out, records)
    return with_ranks(options, argv, lambda: _generate(options, reading, records))


def _with_system(records: list[PromptRecord], text: str) -> list[PromptRecord]:
    for record in records:
        if isinstance(record.prompt, str):
            raise UserError(f"--system conflicts with {record.source}, whose prompt is a string "
                            "and is taken as it is, past the chat template. Write it as messages, "
                            "or remove --system.")
    return [record.with_system(text) for record in records]


def _generate(
    options: argparse.Namespace, reading: Reading, records: list[PromptRecord]
) -> None:
    model = open_model(options)
    progress = Console(enabled=model.topology.is_main)
    say_what_was_read(progress, reading, model.tokenizer, records)
    prompts = prompt_ids(model.tokenizer, records)
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
        _generate_rest(options, model, sampling, records, prompts, partial)
        on_main(lambda: partial.finish() if partial is not None else None, model.topology)
        progress.note(f"wrote {len(records) * options.num_samples} responses to {options.out}")
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
    options: argparse.Namespace, model: OpenModel, sampling: SamplingConfig,
    records: Sequence[PromptRecord], prompts: Sequence[np.ndarray], partial: PartialJsonl | None,
) -> None:
    """Sample the lines not written yet, part by part; the main rank, with ``partial``, writes.

    A line is a sample of a prompt; those of one prompt follow each other. Its key follows from its
    prompt's place in the file and its number, so neither the parts, nor where a kill fell, nor
    how many samples a prompt has changes any, and a resumed command may have another layout.
    Collective over every rank.
    """
    progress, each = Console(enabled=model.topology.is_main), options.num_samples
    topology, count = ranks(model.policy, progress), len(prompts) * each
    # How many are there from an earlier start; a refusal reaches every rank.
    start = on_main(lambda: partial.begin() if partial is not None else 0, topology)
    if start:
        what = "prompts" if each == 1 else "samples"
        progress.note(f"resuming: {start} of {count} {what} are done")
    share = slice(topology.dp_rank, None, topology.dp_size)
    size = _part_size(options, topology.dp_size)
    lines_of = _Lines(options, model, records, prompts)
    finished = tokens = 0
    with progress.generation(len(range(start, count)[share])) as advance:
        for first in range(start, count, size):
            lines = range(first, min(first + size, count))
            samples = model.policy.generate(
                [prompts[line // each] for line in lines], sampling,
                functools.partial(_advance, advance, finished, tokens),
                keys=[line % each * len(prompts) + line // each for line in lines],
                on_finished=functools.partial(lines_of.stream, first) if options.stream and (
                    partial is not None) else None,
                ends=functools.partial(lines_of.ends, first) if options.stop else None,
            )
            finished += len(lines[share])  # what is shown is this replica's share
            tokens += sum(len(sample.token_ids) for sample in samples[share])
            # A full disk must not leave the other ranks in the next part's first collective.
            on_main(functools.partial(_write, options, lines_of, lines, samples, partial), topology)
            lines_of.forget()


def _write(
    options: argparse.Namespace, lines_of: "_Lines", lines: range, samples: Sequence[Sample],
    partial: PartialJsonl | None,
) -> None:
    """Commit a part and stream what other replicas sampled of it; on the main rank."""
    assert partial is not None
    partial.append([
        lines_of.made(line, sample) for line, sample in zip(lines, samples, strict=True)])
    if options.stream:
        for place, sample in enumerate(samples):  # those of other replicas were not seen yet
            lines_of.stream(lines.start, place, sample)
        lines_of.raise_failed()


def _part_size(options: argparse.Namespace, replicas: int) -> int:
    """Lines between two writes. What other replicas sample can be streamed only then."""
    default = STREAM_PART if options.stream and replicas > 1 else PART
    return (options.part_size or default) * replicas


def _advance(advance: Callable[..., None], finished: int, tokens: int, done: int, new: int) -> None:
    advance(finished + done, tokens + new)


class _Lines:
    """Samples as lines of the output, each made once: of a part, until it is forgotten."""

    def __init__(
        self, options: argparse.Namespace, model: OpenModel, records: Sequence[PromptRecord],
        prompts: Sequence[np.ndarray],
    ) -> None:
        self._records, self._prompts, self._each = records, prompts, options.num_samples
        self._tokenizer = model.tokenizer
        self._stops = StopTexts(options.stop, model.tokenizer.decode) if options.stop else None
        self._made: dict[int, dict[str, Any]] = {}
        self._streamed: set[int] = set()
        self._failed: OSError | None = None

    def ends(self, first: int, place: int, token_ids: np.ndarray) -> bool:
        """Whether the response in this place of the part has a ``--stop`` text by now."""
        assert self._stops is not None
        line = first + place
        return self._stops.ends(line, token_ids, self._decode(line))

    def made(self, line: int, sample: Sample) -> dict[str, Any]:
        """The output line of a sample."""
        found = self._made.get(line)
        if found is None:
            found = self._made[line] = self._make(line, sample)
        return found

    def stream(self, first: int, place: int, sample: Sample) -> None:
        """Print a line, unless it has been: in the order in which responses are finished."""
        line = first + place
        if line in self._streamed or self._failed is not None:
            return
        self._streamed.add(line)
        try:
            sys.stdout.buffer.write(json_line(self.made(line, sample)))
            sys.stdout.buffer.flush()
        except OSError as error:  # in the midst of the engine's steps, which peers take part in
            self._failed = error

    def raise_failed(self) -> None:
        """Say that standard output is closed or full, once nobody is in the engine."""
        if self._failed is not None:
            raise UserError(
                f"--stream cannot write to standard output: {self._failed}. The lines finished by "
                "now are kept; start the same command again, with or without --stream, to go on."
            ) from self._failed

    def forget(self) -> None:
        """A part is written."""
        self._made.clear()
        self._streamed.clear()

    def _decode(self, line: int) -> Callable[[np.ndarray], str]:
        # Such a text that ``score``, given it with the prompt, sees these very ids.
        record, prompt = (of[line // self._each] for of in (self._records, self._prompts))
        return functools.partial(
            self._tokenizer.response_text, prompt, plain=record.conversation.plain)

    def _make(self, line: int, sample: Sample) -> dict[str, Any]:
        decode = self._decode(line)
        if self._stops is None:
            response = decode(sample.token_ids)
        else:
            response, sample = self._stops.cut(sample, decode)
        numbered = {"sample": line % self._each} if self._each > 1 else {}
        return self._records[line // self._each].output() | numbered | {
            "response": response,
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
        digest.update(json_line(record.output()))
        digest.update(prompt.tobytes())
    return {
        "model": str(options.model.resolve()), "weights": model.weights,
        "precision": model.precision, "prompts": digest.hexdigest()[:16],
        **dataclasses.asdict(sampling),
        **({"stop": options.stop} if options.stop else {}),
        **({"num_samples": options.num_samples} if options.num_samples > 1 else {}),
    }
