"""Tools, tool calls and thinking: rendered by the template, or refused by name."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_irl.data.chat_template import REASONING_FIELDS, ChatTemplate
from megatron_irl.data.conversation import Conversation, Messages
from megatron_irl.data.records import RecordError


def rendered(
    template: ChatTemplate, conversation: Conversation, messages: Messages,
    add_generation_prompt: bool,
) -> str:
    """The text of ``messages`` with the conversation's tools and arguments."""
    return template.render(
        messages, add_generation_prompt=add_generation_prompt, tools=conversation.tools,
        arguments=conversation.template_args,
    ).text


def with_parsed_arguments(template: ChatTemplate, conversation: Conversation) -> Conversation:
    """Return the conversation with the arguments of its tool calls as the template wants them.

    Files hold them as objects or as JSON text. Most templates want objects, and either fail on text
    or write it as a quoted string; where the text does not come out as it is, it is parsed.
    """
    texts = [text for message in conversation.messages for text in _argument_texts(message)]
    if not texts:
        return conversation
    try:
        written = rendered(template, conversation, conversation.messages, False)
        if all(text in written for text in texts):
            return conversation
    except RecordError:
        pass  # the template fails on text; if it fails on objects too, the caller will hear of it
    messages = [_with_objects(message) for message in conversation.messages]
    return Conversation(**vars(conversation) | {"messages": messages})


def _argument_texts(message: dict[str, Any]) -> list[str]:
    """The arguments of a message's tool calls that are JSON text of an object."""
    functions = [_function(call) for call in message.get("tool_calls") or ()]
    return [f["arguments"] for f in functions if _parsed(f.get("arguments")) is not None]


def _function(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _parsed(arguments: Any) -> dict[str, Any] | None:
    if not isinstance(arguments, str):
        return None
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        value = _parsed(function.get("arguments"))
        if value is not None:
            function = function | {"arguments": value}
            call = call | {"function": function} if "function" in call else function
        calls.append(call)
    return message | {"tool_calls": calls}


def check_structure(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse what the template would drop in silence.

    Tools, tool calls, and the thinking of the last turn; that of earlier turns is left out by
    templates on purpose. Each is rendered with and without: no template says what it knows.
    """
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
    fields = vars(conversation)
    if conversation.tools:
        yield '"tools"', Conversation(**fields | {"tools": None})
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
                yield f'"messages"[{i}]."{key}"', Conversation(**fields | {"messages": changed})
