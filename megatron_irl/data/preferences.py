"""Preference pairs: records of a prompt with a chosen and a rejected answer → token ids."""

from dataclasses import dataclass, replace

import numpy as np

from megatron_irl.data.conversation import Conversation
from megatron_irl.data.demonstrations import Limits, Overlong, Remarks, remark_texts
from megatron_irl.data.readers import RecordError
from megatron_irl.data.records import collect_in_batches
from megatron_irl.data.rendering import Encoded, encode_conversations
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
        remarks: As in ``LoadReport``; both answers of a record count.
    """

    dropped_prompt = dropped_response = equal = truncated_prompts = 0

    def __init__(self) -> None:
        super().__init__()
        self.remarks = Remarks()

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
        return "; ".join([*parts, *remark_texts(self.remarks)])


def load_preferences(
    paths: Paths | Reading,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int,
    overlong: Overlong = "drop",
) -> Preferences:
    """Read ``{"prompt", "chosen", "rejected"}`` records from files, in order.

    The two are strings, or messages of which the last is the assistant's; these may repeat the
    conversation before the answer, as files of the HH kind do, and ``prompt`` may then be left out.

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
    limits = Limits(max_prompt_length, max_response_length, overlong)
    found = Preferences()

    def share(batch: list[Conversation]) -> list[tuple[Encoded, Encoded] | RecordError]:
        sides = [side for conversation in batch for side in _sides(conversation)]
        encoded = encode_conversations(tokenizer, sides)
        return [_both(*pair) for pair in zip(encoded[0::2], encoded[1::2], strict=True)]

    def build(
        conversation: Conversation, sides: tuple[Encoded, Encoded] | RecordError
    ) -> Preference | None:
        if isinstance(sides, RecordError):
            raise sides
        return _preference(found, tokenizer, limits, conversation.source, sides)

    found += collect_in_batches(
        paths, lambda conversation: conversation, share, build, purpose="preference")
    return found


def _preference(
    counts: Preferences, tokenizer: Tokenizer, limits: Limits, source: str,
    sides: tuple[Encoded, Encoded],
) -> Preference | None:
    """A preference if it is within the limits, and counted if it is not."""
    prompt_ids = common_prompt(*sides)
    answers = [each.ids[len(prompt_ids) :] for each in sides]
    for each in sides:
        counts.remarks.add(each.remarks, source)
    reason = limits.reason_to_drop(len(prompt_ids), max(map(len, answers)))
    if reason is None and answers[0] == answers[1]:
        reason = "equal"
    if reason is not None:
        setattr(counts, reason, getattr(counts, reason) + 1)
        return None
    cut = limits.cut(prompt_ids, tokenizer.bos_id)
    counts.truncated_prompts += len(cut) < len(prompt_ids)
    return Preference(*(np.array(ids, np.int32) for ids in (cut, *answers)), source=source)


def common_prompt(first: Encoded, second: Encoded) -> list[int]:
    """The prompt of two answers to the same: the shorter one, where a token reaches into one."""
    return min(first.prompt_ids, second.prompt_ids, key=len)


def _sides(conversation: Conversation) -> tuple[Conversation, Conversation]:
    assert conversation.rejected is not None
    chosen = replace(conversation, rejected=None)
    return chosen, replace(chosen, messages=conversation.rejected)


def _both(
    chosen: Encoded | RecordError, rejected: Encoded | RecordError
) -> tuple[Encoded, Encoded] | RecordError:
    """Both sides as ids, or what is wrong with one of them, named."""
    if isinstance(chosen, RecordError):
        return type(chosen)(f'"chosen": {chosen}')
    if isinstance(rejected, RecordError):
        return type(rejected)(f'"rejected": {rejected}')
    prompt_ids = common_prompt(chosen, rejected)
    if any(each.ids[: len(prompt_ids)] != prompt_ids for each in (chosen, rejected)):
        return RecordError('the chat template renders what comes before "chosen" and "rejected" '
                           "differently; no prompt would lead to both")
    return chosen, rejected
