"""Messages as people write them → messages as chat templates take them."""

import json
from typing import Any

from megatron_irl.data.conversation import Messages
from megatron_irl.data.readers import RecordError, kind_name

ROLES = ("system", "user", "assistant", "tool")
# Other names of the four; ``developer`` is what newer interfaces call the system turn.
_ROLE_OF = {role: role for role in ROLES} | {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant", "bing": "assistant",
    "bard": "assistant", "claude": "assistant", "developer": "system", "function": "tool",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of a turn whose text is a call as JSON
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text")
_THINKING = ("thinking", "reasoning")  # kinds of content parts that come before the answer


def checked_messages(messages: Any, key: str, role: str = "", content: str = "") -> Messages:
    """Return the messages in the one form that templates know.

    Read are lists of objects, the same as a JSON string, and an object of lists (a column each).
    Roles have their usual other names (``human``, ``gpt``...), ``from`` and ``value`` become
    ``role`` and ``content``, parts of text one text, thinking parts ``reasoning_content``, and the
    arguments of tool calls objects. Null fields are left out; other fields are kept.

    Args:
        messages: As the record has them.
        key: Their name in the record, for messages.
        role, content: What the two fields are called, if not by one of the usual names.

    Raises:
        RecordError: Not messages, a role of no known name, or content that is not text.
    """
    messages = _as_list(messages, key)
    checked: Messages = []
    for i, message in enumerate(messages):
        if type(message) is dict and len(message) == 2 and not role and not content:
            # Nearly every message: nothing to change, so nothing is copied.
            text = message.get("content")
            if type(text) is str and message.get("role") in ROLES:
                checked.append(message)
                if not text.isascii():
                    text_of(text, f'"{key}"[{i}]: content', allow_empty=True)
                continue
        where = f'"{key}"[{i}]'
        if not isinstance(message, dict):
            raise RecordError(f"{where} must be an object, not {kind_name(message)}")
        checked.append(_message(message, where, role, content))
    return checked


def checked_message(message: Any, key: str, role: str = "", content: str = "") -> dict[str, Any]:
    """Return one message, as ``checked_messages`` does."""
    return checked_messages([message], key, role, content)[0]


def checked_tools(tools: Any, key: str) -> list[dict[str, Any]] | None:
    """Return descriptions of tools, given as a list or as JSON; None where there are none.

    Raises:
        RecordError: Neither a list nor the JSON of one, or an entry that is not an object.
    """
    tools = _parsed(tools)
    if tools in (None, [], "", {}):
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise RecordError(f'"{key}" must be a list of tools, not {kind_name(tools)}')
    checked = []
    for i, each in enumerate(tools):
        tool = _parsed(each)
        if not isinstance(tool, dict):
            raise RecordError(f'"{key}"[{i}] must be an object, not {kind_name(tool)}')
        bare = "name" in tool and "function" not in tool
        checked.append({"type": "function", "function": tool} if bare else tool)
    return checked


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls as ``{"type", "function": {"name", "arguments"}}``, arguments as objects.

    Raises:
        RecordError: They are not calls.
    """
    calls = _parsed(calls)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise RecordError(f"{where}: tool_calls must be a list, not {kind_name(calls)}")
    checked = []
    for call in map(_parsed, calls):
        function = _parsed(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"{where}: a tool call needs a function with a name, not "
                              f"{kind_name(call)}")
        # Templates look into the arguments, or write them as JSON: both want the object.
        arguments = _parsed(function.get("arguments", function.get("parameters", {})))
        extra = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
        checked.append({"type": "function", **extra,
                        "function": {"name": function["name"], "arguments": arguments}})
    return checked


def text_of(
    value: Any, name: str, allow_empty: bool = False,
    empty: type[RecordError] = RecordError,
) -> str:
    """Return a string that can be encoded, with something in it unless ``allow_empty``.

    Raises:
        RecordError: It is something else; the message begins with ``name``. Of the class ``empty``
            if it is empty.
    """
    if not isinstance(value, str):
        raise RecordError(f"{name} must be a string, not {kind_name(value)}")
    if not allow_empty and not value.strip():
        raise empty(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{name} holds an unpaired surrogate: {error}") from None
    return value


def _as_list(messages: Any, key: str) -> list[Any]:
    if isinstance(messages, str):
        parsed = _parsed(messages)
        if isinstance(parsed, str):
            raise RecordError(f'"{key}" must be a list of messages, not a string')
        messages = parsed
    if isinstance(messages, dict):  # a column each, as pandas and older datasets have them
        columns = list(messages.values())
        if not columns or not all(isinstance(column, list) for column in columns):
            raise RecordError(f'"{key}" must be a list of messages, not an object')
        if len(set(map(len, columns))) > 1:
            raise RecordError(f'"{key}" has lists of different lengths')
        return [dict(zip(messages, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(messages, list):
        raise RecordError(f'"{key}" must be a list of messages, not {kind_name(messages)}')
    return messages


def _message(message: dict[str, Any], where: str, role: str, content: str) -> dict[str, Any]:
    fields = {k: v for k, v in message.items() if v is not None}
    role_key = _which(fields, role, _ROLE_KEYS, where)
    name = fields.pop(role_key)
    known = str(name).strip().lower()
    if known not in _ROLE_OF and known not in _CALLS:
        others = ", ".join(k for k in _ROLE_OF if k not in ROLES)
        raise RecordError(f"{where}: role {name!r} is none of {', '.join(ROLES)}, or of their "
                          f"other names ({others})")
    text_key = content or next((k for k in _TEXT_KEYS if k in fields), "content")
    value = fields.pop(text_key, None)
    if known in _CALLS:
        calls = tool_calls(value, where)
        return {"role": "assistant", "content": "", "tool_calls": calls, **fields}
    result = {"role": _ROLE_OF[known], "content": "", **fields}
    calls = fields.get("tool_calls") or result.pop("function_call", None)
    if calls:
        result["tool_calls"] = tool_calls(calls, where)
    else:
        result.pop("tool_calls", None)
    if isinstance(value, list):
        value, thoughts = _joined(value, where)
        if thoughts:
            result["reasoning_content"] = thoughts
    if value is None and calls:
        value = ""
    result["content"] = text_of(value, f"{where}: content", allow_empty=True)
    return result


def _which(fields: dict[str, Any], given: str, usual: tuple[str, ...], where: str) -> str:
    names = (given,) if given else usual
    found = next((name for name in names if name in fields), None)
    if found is None:
        keys = ", ".join(map(str, fields)) or "none"
        raise RecordError(f'{where}: no "{names[0]}"; its keys are: {keys}')
    return found


def _joined(parts: list[Any], where: str) -> tuple[str, str]:
    """The text of content in parts, and that of its thinking parts."""
    texts, thoughts = [], []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else kind_name(part)
        if kind in _THINKING:
            text = part.get(kind, part.get("text"))
            thoughts.append(text_of(text, f"{where}: content[{i}]: {kind}", allow_empty=True))
        elif isinstance(part, dict) and kind in ("text", "input_text", "output_text"):
            name = f"{where}: content[{i}]: text"
            texts.append(text_of(part.get("text"), name, allow_empty=True))
        else:
            raise RecordError(f"{where}: content[{i}] is of the kind {kind!r}; only text can be "
                              "read")
    return "".join(texts), "\n".join(thoughts)


def _parsed(value: Any) -> Any:
    """The value of a string that is JSON of an object or a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value
