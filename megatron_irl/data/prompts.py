"""Prompts to generate from, and responses to score: records in, conversations out."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_irl.data.conversation import Conversation, Messages
from megatron_irl.data.formats import prompt_of
from megatron_irl.data.records import collect
from megatron_irl.data.sources import Paths, Reading


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to generate from.

    Attributes:
        conversation: Its turns, the last not the assistant's.
        record: The input object, for the output line.
    """

    conversation: Conversation
    record: dict[str, Any]

    @property
    def source(self) -> str:
        """``file:line`` of the record."""
        return self.conversation.source

    @property
    def prompt(self) -> str | Messages:
        """A string where it is taken as it is, past the chat template; else messages."""
        return prompt_of(self.conversation)

    def with_system(self, text: str) -> "PromptRecord":
        """The prompt with a system turn, unless it has one; a string prompt stays one."""
        messages = self.conversation.messages
        if self.conversation.plain or messages[0]["role"] == "system":
            return self
        turn = {"role": "system", "content": text}
        return replace(self, conversation=replace(self.conversation, messages=[turn, *messages]))

    def output(self) -> dict[str, Any]:
        """The record with ``prompt`` as it was generated from, so that ``score`` finds it."""
        prompt = self.prompt
        return self.record if self.record.get("prompt") == prompt else (
            self.record | {"prompt": prompt})


@dataclass(frozen=True)
class ScoreRecord:
    """A prompt and responses to score.

    Attributes:
        conversations: One per response, which is its last turn.
        record: The input object, for the output line.
    """

    conversations: list[Conversation]
    record: dict[str, Any]

    @property
    def source(self) -> str:
        """``file:line`` of the record."""
        return self.conversations[0].source

    @property
    def prompt(self) -> str | Messages:
        """What comes before the responses."""
        return prompt_of(self.conversations[0])

    @property
    def responses(self) -> list[str]:
        """The texts of the responses."""
        return [each.messages[-1]["content"] for each in self.conversations]


def load_prompts(paths: Paths | Reading) -> list[PromptRecord]:
    """Read prompts: a ``prompt``, or whatever ``train`` takes, without its last answer.

    Raises:
        UserError: Unusable records, named by file and line; a missing or empty file.
    """
    return collect(paths, lambda found, record: PromptRecord(found[0], record), "prompt")


def load_score_records(paths: Paths | Reading) -> list[ScoreRecord]:
    """Read what is to be scored: ``{"prompt", "responses"}``, or whatever ``train`` takes.

    Of a preference both answers are scored, the chosen one first; of a conversation its last
    answer.

    Raises:
        UserError: Unusable records, named by file and line; a missing or empty file.
    """
    return collect(paths, lambda found, record: ScoreRecord(found, record), "score")
