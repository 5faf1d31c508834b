"""Demonstrations: conversations in, token ids and counts out."""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.formats import prompt_of
from megatron_irl.data.readers import RecordError
from megatron_irl.data.records import collect_in_batches
from megatron_irl.data.rendering import REMARKS, Encoded
from megatron_irl.data.sources import Paths, Reading
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.data.turns import TURNS_REMARKS, Turned, Turns, encode_turns
from megatron_irl.errors import UserError
from megatron_irl.types import Demonstration

Overlong = Literal["drop", "error", "truncate_prompt"]


@dataclass(frozen=True)
class Limits:
    """How long prompt and response may be, in tokens, and what becomes of longer ones.

    Attributes:
        max_prompt_length: Of the rendered prompt, the assistant's header included.
        max_response_length: Of the response, its end included. Under ``data.turns: all`` that is
            everything from the first answer on.
        overlong: As ``data.overlong``.
    """

    max_prompt_length: int
    max_response_length: int
    overlong: Overlong = "drop"

    def reason_to_drop(self, prompt: int, response: int) -> str | None:
        """Return the count to raise if a record of these lengths is to be left out, else None.

        Raises:
            RecordError: It is over a limit, and ``overlong`` is ``error``.
        """
        if prompt <= self.max_prompt_length and response <= self.max_response_length:
            return None
        cuts = self.overlong == "truncate_prompt"
        too_long = [
            (f"{what} has {length} tokens, data.max_{what}_length={limit}", f"dropped_{what}")
            for what, length, limit in (("prompt", prompt, self.max_prompt_length),
                                        ("response", response, self.max_response_length))
            if length > limit and not (what == "prompt" and cuts)
        ]  # fmt: skip
        if too_long and self.overlong == "error":
            raise RecordError("; ".join(text for text, _ in too_long)
                              + "; data.overlong=error refuses it. Raise the limit or set "
                              "data.overlong to drop or truncate_prompt.")
        return too_long[0][1] if too_long else None

    def cut(self, prompt_ids: list[int], bos_id: int | None) -> list[int]:
        """Return the prompt without as much of its beginning as is over the limit.

        A BOS stays where it is: models have not seen a sequence without one.
        """
        limit = self.max_prompt_length
        if len(prompt_ids) <= limit:
            return prompt_ids
        if prompt_ids[0] == bos_id and limit > 1:
            return [prompt_ids[0], *prompt_ids[1 - limit :]]
        return prompt_ids[-limit:]


@dataclass(frozen=True)
class LoadReport:
    """What became of the records of a demonstration file.

    Attributes:
        kept: Demonstrations loaded.
        dropped_prompt: Those left out because the prompt is over-long.
        dropped_response: Those left out because the response, EOS included, is over-long.
        truncated_prompts: Demonstrations kept whose prompt lost its beginning.
        prompt_tokens, response_tokens: Totals over the demonstrations kept.
        prompt_lengths, response_lengths: Tokens of each demonstration, those left out included.
        remarks: What the records show of the chat template: how many, and the first of them.
    """

    kept: int = 0
    dropped_prompt: int = 0
    dropped_response: int = 0
    truncated_prompts: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))
    remarks: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Demonstrations left out, for whatever reason."""
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
        return "; ".join([*parts, *remark_texts(self.remarks)])


class Remarks(dict[str, tuple[int, str]]):
    """How many records show something of the chat template, and the first of them."""

    def add(self, names: Sequence[str], source: str) -> None:
        """Count a record."""
        for name in names:
            count, first = self.get(name, (0, source))
            self[name] = count + 1, first


def remark_texts(remarks: dict[str, tuple[int, str]]) -> list[str]:
    """What the remarks say, for the log."""
    texts = REMARKS | TURNS_REMARKS
    return [f"{count} {texts[name]} (the first: {first})"
            for name, (count, first) in remarks.items()]


def load_demonstrations(
    paths: Paths | Reading,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
    turns: Turns = "last",
    limit: int | None = None,
) -> tuple[list[Demonstration], LoadReport]:
    """Read demonstrations from files, in order.

    A record is a conversation whose last turn is the assistant's, in any form that ``formats``
    knows; fields that the form has no use for are ignored.

    Args:
        paths: One file or several, or how they are to be read.
        tokenizer: The model's.
        max_prompt_length: Tokens of the rendered prompt.
        max_response_length: Tokens of the response, EOS included.
        overlong: ``drop`` leaves over-long records out and counts them; ``error`` refuses them;
            ``truncate_prompt`` keeps a prompt's last tokens, and its BOS. A response is never cut,
            since a cut one has no EOS to learn from: ``truncate_prompt`` leaves those out.
        turns: Which of the assistant's turns are learnt, see ``turns.encode_turns``.
        limit: Stop once this many records are loaded; what follows is not even checked.

    Raises:
        UserError: Malformed records, named by file and line; a file that is missing or empty;
            nothing left to train on.
    """
    kept: list[Demonstration] = []
    report = read_demonstrations(
        paths, tokenizer, kept.append, max_prompt_length=max_prompt_length,
        max_response_length=max_response_length, overlong=overlong, turns=turns, limit=limit,
    )
    return kept, report


def read_demonstrations(
    paths: Paths | Reading,
    tokenizer: Tokenizer,
    keep: Callable[[Demonstration], object],
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
    turns: Turns = "last",
    limit: int | None = None,
) -> LoadReport:
    """As ``load_demonstrations``, but gives each to ``keep`` and holds none.

    Bad records are told of after the last one: ``keep`` has then been given the good ones.
    """
    builder = _Builder(tokenizer, Limits(max_prompt_length, max_response_length, overlong))

    def share(batch: list[Conversation]) -> list[Turned | RecordError]:
        return encode_turns(tokenizer, batch, turns)

    def build(record: Conversation, found: Turned | RecordError) -> bool | None:
        del record
        built = builder.build(found)
        for demonstration in built:
            keep(demonstration)
        return bool(built) or None  # only how many there are counts here

    collect_in_batches(paths, lambda conversation: conversation, share, build, limit)
    report = builder.report()
    if not report.kept:
        raise UserError(f"no demonstration is left in {Reading.of(paths)}: {report.summary()}. "
                        f"Raise data.max_prompt_length={max_prompt_length} or "
                        f"data.max_response_length={max_response_length}.")
    return report


class _Builder:
    """Makes demonstrations of encoded records, and counts."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._counts: Counter[str] = Counter()
        self._remarks = Remarks()
        self._prompt_lengths, self._response_lengths = array("i"), array("i")

    def build(self, found: Turned | RecordError) -> list[Demonstration]:
        """The demonstrations of a record that are within the limits."""
        if isinstance(found, RecordError):
            raise found
        built = [self._demonstration(*turn) for turn in found]
        return [demonstration for demonstration in built if demonstration is not None]

    def _demonstration(
        self, conversation: Conversation, encoded: Encoded
    ) -> Demonstration | None:
        prompt_ids, response_ids = encoded.prompt_ids, encoded.response_ids
        if encoded.remarks:
            self._remarks.add(encoded.remarks, conversation.source)
        self._prompt_lengths.append(len(prompt_ids))
        self._response_lengths.append(len(response_ids))
        reason = self._limits.reason_to_drop(len(prompt_ids), len(response_ids))
        if reason is not None:
            self._counts[reason] += 1
            return None
        cut = self._limits.cut(prompt_ids, self._tokenizer.bos_id)
        counts = self._counts
        counts["truncated_prompts"] += len(cut) < len(prompt_ids)
        counts["kept"] += 1
        counts["prompt_tokens"] += len(cut)
        counts["response_tokens"] += len(response_ids)
        return Demonstration(
            counts["kept"] - 1, np.array(cut, np.int32), np.array(response_ids, np.int32),
            prompt_of(conversation), conversation.messages[-1]["content"], conversation.answer,
            conversation.source, _mask(encoded))

    def report(self) -> LoadReport:
        """What became of the records so far."""
        names = ("kept", "dropped_prompt", "dropped_response", "truncated_prompts",
                 "prompt_tokens", "response_tokens")
        return LoadReport(**{name: self._counts[name] for name in names},
                          prompt_lengths=self._prompt_lengths,
                          response_lengths=self._response_lengths, remarks=self._remarks)


def _mask(encoded: Encoded) -> np.ndarray | None:
    """Which of the response's tokens are learnt; None: all of them."""
    if len(encoded.spans) == 1:
        return None
    mask = np.zeros(len(encoded.ids), dtype=bool)
    for start, end in encoded.spans:
        mask[start:end] = True
    return mask[encoded.spans[0][0] :]
