"""Preference pairs: records of a prompt with a chosen and a rejected answer → token ids."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.demonstrations import Overlong, overlong_count
from megatron_irl.data.formats import prompt_of
from megatron_irl.data.records import RecordError, collect
from megatron_irl.data.sources import Paths, Reading
from megatron_irl.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Preference:
    """One prompt with the better and the worse answer as token ids.

    Attributes:
        prompt_ids: int32 [prompt tokens], the rendered prompt including the assistant header.
        chosen_ids, rejected_ids: int32 [response tokens], each ending with EOS exactly once.
        source: ``file:line`` of the record.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    source: str


class Preferences(list[Preference]):
    """The preferences kept, and how many records were left out.

    Attributes:
        dropped_prompt, dropped_response: Records with an over-long prompt, or answer.
        equal: Records whose answers are the same tokens.
        truncated_prompts: Preferences kept whose prompt lost its beginning.
    """

    dropped_prompt = dropped_response = equal = truncated_prompts = 0

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{len(self)} preferences"]
        if self.dropped_prompt or self.dropped_response:
            parts.append(f"dropped {self.dropped_prompt + self.dropped_response} over-long "
                         f"({self.dropped_prompt} by the prompt, {self.dropped_response} by a "
                         "response)")
        if self.equal:
            parts.append(f"dropped {self.equal} with equal answers")
        if self.truncated_prompts:
            parts.append(f"cut the beginning of {self.truncated_prompts} prompts")
        return "; ".join(parts)


def load_preferences(
    paths: Paths | Reading,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
) -> Preferences:
    """Read ``{"prompt", "chosen", "rejected"}`` records from files, in order.

    ``prompt`` is a string or messages; ``chosen`` and ``rejected`` are strings, or messages of
    which the last is the assistant's. Messages may repeat the conversation before the answer, as
    files of the HH kind do; ``prompt`` may then be left out, or be the text of its last message.
    Other fields are ignored.

    Args:
        paths: One file or several.
        tokenizer: The model's.
        max_prompt_length: Tokens of the rendered prompt.
        max_response_length: Tokens of either answer, EOS included.
        overlong: What becomes of longer ones, as in ``load_demonstrations``.

    Returns:
        The preferences, with counts of what was left out; possibly none.

    Raises:
        UserError: Malformed records (a side missing, prompts that differ, over-long under
            ``overlong="error"``), named by file and line; a file that is missing or empty;
            messages, but no chat template.
    """
    counts: Counter[str] = Counter()

    def build(conversations: list[Conversation], record: dict[str, Any]) -> Preference | None:
        del record
        (conversation,) = conversations
        assert conversation.rejected is not None
        prompt = prompt_of(conversation)
        texts = [side[-1]["content"] for side in (conversation.messages, conversation.rejected)]
        if not isinstance(prompt, str):
            tokenizer.require_chat_template()
        prompt_ids = tokenizer.render_prompt(prompt)
        answers = [_answer_ids(tokenizer, key, text)
                   for key, text in zip(("chosen", "rejected"), texts, strict=True)]
        if not prompt_ids:
            raise RecordError("the prompt has no tokens")
        reason = overlong_count(len(prompt_ids), max(map(len, answers)), max_prompt_length,
                                max_response_length, overlong)
        if reason is None and answers[0] == answers[1]:
            reason = "equal"
        if reason is not None:
            counts[reason] += 1
            return None
        if len(prompt_ids) > max_prompt_length:
            counts["truncated_prompts"] += 1
            prompt_ids = prompt_ids[-max_prompt_length:]
        ids = [np.array(each, np.int32) for each in (prompt_ids, *answers)]
        return Preference(ids[0], ids[1], ids[2], conversation.source)

    preferences = Preferences(collect(paths, build, "preference"))
    for name, count in counts.items():
        setattr(preferences, name, count)
    return preferences


def _answer_ids(tokenizer: Tokenizer, key: str, text: str) -> list[int]:
    try:
        ids = tokenizer.response_ids(text)
    except RecordError as error:
        raise RecordError(f'"{key}": {error}') from None
    if len(ids) == 1:
        raise RecordError(f'"{key}" has no tokens')
    return ids
