"""Demonstrations, prompts and responses to score: records in, token ids and counts out."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from megatron_irl.data.conversation import Conversation, Messages
from megatron_irl.data.formats import prompt_of
from megatron_irl.data.records import RecordError, collect_in_batches
from megatron_irl.data.sources import Paths, Reading
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
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


class _Texts(NamedTuple):
    """A record on its way to a demonstration: what it says, and its prompt as it is encoded."""

    conversation: Conversation
    prompt: str | Messages
    rendered: str
    response: str


def load_demonstrations(
    paths: Paths | Reading,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
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
            ``truncate_prompt`` keeps a prompt's last tokens. A response is never cut, since a cut
            one has no EOS to learn from: ``truncate_prompt`` leaves those records out.
        limit: Stop once this many demonstrations are loaded; what follows is not even checked.

    Raises:
        UserError: Malformed records, named by file and line; a file that is missing or empty;
            nothing left to train on.
    """
    counts: Counter[str] = Counter()

    def prepare(conversation: Conversation) -> _Texts:
        prompt = prompt_of(conversation)
        return _Texts(conversation, prompt, tokenizer.prompt_text(prompt),
                      conversation.messages[-1]["content"])

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
            texts.prompt, texts.response, texts.conversation.answer, texts.conversation.source)

    demonstrations = collect_in_batches(paths, prepare, partial(_encode, tokenizer), build, limit)
    report = LoadReport(**{name: counts[name] for name in LoadReport.__dataclass_fields__})
    if not demonstrations:
        raise UserError(f"no demonstration is left in {Reading.of(paths)}: {report.summary()}. "
                        f"Raise data.max_prompt_length={max_prompt_length} or "
                        f"data.max_response_length={max_response_length}.")
    return demonstrations, report


def _encode(tokenizer: Tokenizer, batch: list[_Texts]) -> list[tuple[list[int], list[int]]]:
    """The ids of each prompt and response."""
    ids = tokenizer.encode_batch([t for texts in batch for t in (texts.rendered, texts.response)])
    return list(zip(ids[0::2], ids[1::2], strict=True))


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
