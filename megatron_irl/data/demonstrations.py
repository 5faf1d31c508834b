"""Demonstrations, prompts and responses to score: records in, token ids and counts out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_irl.data.records import (
    Messages,
    RecordError,
    awaiting_assistant,
    checked_messages,
    checked_prompt,
    checked_text,
    checked_texts,
    collect,
    collect_in_batches,
)
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_jsonl_atomically as write_jsonl_atomically
from megatron_irl.types import Demonstration

Overlong = Literal["drop", "error", "truncate_prompt"]


@dataclass(frozen=True)
class LoadReport:
    """What became of the records of a demonstration file.

    Attributes:
        kept: Demonstrations loaded.
        dropped_prompt: Records left out because the prompt is over-long.
        dropped_response: Records left out because the response, EOS included, is over-long.
        truncated_prompts: Demonstrations kept whose prompt lost its beginning.
        prompt_tokens, response_tokens: Totals over the demonstrations kept.
    """

    kept: int
    dropped_prompt: int
    dropped_response: int
    truncated_prompts: int
    prompt_tokens: int
    response_tokens: int

    @property
    def dropped(self) -> int:
        """Records left out, for whatever reason."""
        return self.dropped_prompt + self.dropped_response

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{self.kept} demonstrations ({self.prompt_tokens} prompt tokens, "
                 f"{self.response_tokens} response tokens)"]
        if self.dropped:
            parts.append(f"dropped {self.dropped} over-long ({self.dropped_prompt} by the prompt, "
                         f"{self.dropped_response} by the response)")
        if self.truncated_prompts:
            parts.append(f"cut the beginning of {self.truncated_prompts} prompts")
        return "; ".join(parts)


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to generate from; ``record`` is the input object, for the output line."""

    prompt: str | Messages
    record: dict[str, Any]
    source: str


@dataclass(frozen=True)
class ScoreRecord:
    """A prompt and responses to score; ``record`` is the input object, for the output line."""

    prompt: str | Messages
    responses: list[str]
    record: dict[str, Any]
    source: str


class _Texts(NamedTuple):
    """A record on its way to a demonstration: what it says, and its prompt as it is encoded."""

    record: dict[str, Any]
    source: str
    prompt: str | Messages
    rendered: str
    response: str


def load_demonstrations(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
    limit: int | None = None,
) -> tuple[list[Demonstration], LoadReport]:
    """Read demonstrations from JSONL (``.jsonl``, ``.jsonl.gz``) or Parquet files, in order.

    A record holds ``messages``, the last of them the assistant's, or else ``prompt`` (a string or
    messages) and ``response``; ``answer`` is optional. Other fields are ignored.

    Args:
        paths: One file or several.
        tokenizer: The model's.
        max_prompt_length: Tokens of the rendered prompt.
        max_response_length: Tokens of the response, EOS included.
        overlong: ``drop`` leaves over-long records out and counts them; ``error`` refuses them;
            ``truncate_prompt`` keeps a prompt's last tokens. A response is never cut, since a cut
            one has no EOS to learn from: ``truncate_prompt`` leaves those records out.
        limit: Stop once this many demonstrations are loaded; what follows is not even checked.

    Raises:
        UserError: Malformed records, named by file and line; a file that is missing or empty;
            nothing left to train on.
    """
    counts: Counter[str] = Counter()

    def prepare(record: dict[str, Any], source: str) -> _Texts:
        prompt, response = conversation(record)
        return _Texts(record, source, prompt, tokenizer.prompt_text(prompt), response)

    def build(texts: _Texts, ids: tuple[list[int], list[int]]) -> Demonstration | None:
        prompt_ids = tokenizer.prompt_ids(texts.prompt, ids[0])
        response_ids = tokenizer.ended(ids[1])
        if not prompt_ids or len(response_ids) == 1:
            raise RecordError(f"the {'response' if prompt_ids else 'prompt'} has no tokens")
        reason = overlong_count(len(prompt_ids), len(response_ids), max_prompt_length,
                                max_response_length, overlong)
        if reason is not None:
            counts[reason] += 1
            return None
        if len(prompt_ids) > max_prompt_length:
            counts["truncated_prompts"] += 1
            prompt_ids = prompt_ids[-max_prompt_length:]
        counts.update(kept=1, prompt_tokens=len(prompt_ids), response_tokens=len(response_ids))
        return Demonstration(
            counts["kept"] - 1, np.array(prompt_ids, np.int32), np.array(response_ids, np.int32),
            texts.prompt, texts.response, _answer(texts.record), texts.source)

    demonstrations = collect_in_batches(paths, prepare, partial(_encode, tokenizer), build, limit)
    report = LoadReport(**{name: counts[name] for name in LoadReport.__dataclass_fields__})
    if not demonstrations:
        raise UserError(f"no demonstration is left in {_names(paths)}: {report.summary()}. "
                        f"Raise data.max_prompt_length={max_prompt_length} or "
                        f"data.max_response_length={max_response_length}.")
    return demonstrations, report


def _encode(tokenizer: Tokenizer, batch: list[_Texts]) -> list[tuple[list[int], list[int]]]:
    """The ids of each prompt and response."""
    ids = tokenizer.encode_batch([t for texts in batch for t in (texts.rendered, texts.response)])
    return list(zip(ids[0::2], ids[1::2], strict=True))


def load_prompts(path: str | Path) -> list[PromptRecord]:
    """Read ``{"prompt": string or messages}`` records.

    Raises:
        UserError: Malformed records, named by file and line; a missing or empty file.
    """
    return collect(path, lambda record, source: PromptRecord(
        checked_prompt(record), record, source))


def load_score_records(path: str | Path) -> list[ScoreRecord]:
    """Read ``{"prompt": string or messages, "responses": [string, ...]}`` records.

    Raises:
        UserError: Malformed records, named by file and line; a missing or empty file.
    """
    return collect(path, lambda record, source: ScoreRecord(
        checked_prompt(record), checked_texts(record, "responses"), record, source))


def conversation(record: dict[str, Any]) -> tuple[str | Messages, str]:
    """Return the prompt and the response of a demonstration record, or raise RecordError."""
    if record.get("messages") is None:
        if record.get("prompt") is None and record.get("response") is None:
            raise RecordError('neither "messages" nor "prompt" and "response"')
        return checked_prompt(record), checked_text(record, "response")
    messages = checked_messages(record["messages"], "messages")
    if not messages:
        raise RecordError('"messages" is empty')
    if messages[-1]["role"] != "assistant":
        raise RecordError(f'the last message is from {messages[-1]["role"]!r}; it must be the '
                          "assistant's")
    prompt = awaiting_assistant(messages[:-1])
    return prompt, checked_text(messages[-1], "content")


def _answer(record: dict[str, Any]) -> str | None:
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise RecordError('"answer" must be a string or a number')
    return None if answer is None else str(answer)


def overlong_count(prompt: int, response: int, max_prompt: int, max_response: int,
                   overlong: Overlong) -> str | None:
    """Return the count to raise if a record of these lengths is to be left out, else None.

    Raises:
        RecordError: It is over a limit, and ``overlong`` is ``error``.
    """
    too_long = [
        (f"{what} has {length} tokens, data.max_{what}_length={limit}", f"dropped_{what}")
        for what, length, limit in (("prompt", prompt, max_prompt),
                                    ("response", response, max_response))
        if length > limit and not (what == "prompt" and overlong == "truncate_prompt")
    ]  # fmt: skip
    if too_long and overlong == "error":
        raise RecordError("; ".join(text for text, _ in too_long)
                          + "; data.overlong=error refuses it. Raise the limit or set "
                          "data.overlong to drop or truncate_prompt.")
    return too_long[0][1] if too_long else None


def _names(paths: str | Path | Iterable[str | Path]) -> str:
    return str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths))
