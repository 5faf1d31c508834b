"""What a record says once its file's form is forgotten: readers write it, the encoder reads it."""

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """One record, in the one form that everything after the reading of files knows.

    Attributes:
        messages: In order; each has ``role`` (system, user, assistant, tool) and ``content`` (text,
            possibly empty), and whatever else a template may render: ``reasoning_content``,
            ``tool_calls``, ``name``, ``tool_call_id``... Null fields are left out. A
            demonstration ends with the assistant's message, a prompt does not.
        source: ``file:line`` or ``file:row N``, for messages to the user.
        tools: Descriptions of the tools on offer, as the template wants them.
        answer: The reference answer, for exact match; None if there is none.
        template_args: Further variables for this record's template (``enable_thinking``...). They
            come after ``data.chat_template_args`` and win.
        plain: The prompt is a string that bypasses the chat template. ``messages`` are then the
            user's, with the prompt's text, and (for a demonstration) the assistant's, with the
            response.
        rejected: For a preference, the whole rejected conversation, in the form of ``messages``
            (which is the chosen one): both are the same up to their last assistant message.
    """

    messages: Messages
    source: str
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    rejected: Messages | None = None
