"""Tools, tool calls and thinking: rendered by the template, or refused by name."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_irl.data.chat_template import REASONING_FIELDS, ChatTemplate
from megatron_irl.data.conversation import Conversation, Messages
from megatron_irl.data.readers import RecordError


def rendered(
    template: ChatTemplate, conversation: Conversation, messages: Messages,
    add_generation_prompt: bool,
) -> str:
    """The text of ``messages`` with the conversation's tools and arguments."""
    return template.render(
        messages, add_generation_prompt=add_generation_prompt, tools=conversation.tools,
        arguments=conversation.template_args,
    ).text


def check_structure(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse what the template would drop in silence.

    Tools, tool calls, and the thinking of the last turn; that of earlier turns is left out by
    templates on purpose. Each is rendered with and without: no template says what it knows.
    """
    if not conversation.tools and all(len(m) <= 2 for m in conversation.messages):
        return  # nearly always: role and content
    parts = list(_structured_parts(conversation))
    if not parts:
        return
    whole = rendered(template, conversation, conversation.messages, False)
    for what, without in parts:
        try:
            left = rendered(template, without, without.messages, False)
        except RecordError:
            continue  # it cannot do without: it does read the field
        if left == whole:
            raise RecordError(f"the chat template leaves out {what}. Remove the field, or set "
                              "data.chat_template to a template that renders it")


def _structured_parts(conversation: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Yield the name of each structured part, and the conversation without it."""
    if conversation.tools:
        yield '"tools"', replace(conversation, tools=None)
    messages = conversation.messages
    for i, message in enumerate(messages):
        keys: tuple[str, ...] = ("tool_calls",)
        if i == len(messages) - 1:
            keys += REASONING_FIELDS
        for key in keys:
            if message.get(key):
                names = {key} if key == "tool_calls" else set(REASONING_FIELDS)
                bare = {k: v for k, v in message.items() if k not in names}
                changed = [*messages[:i], bare, *messages[i + 1 :]]
                yield f'"messages"[{i}]."{key}"', replace(conversation, messages=changed)
