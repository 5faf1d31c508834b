"""A record of any known form → one ``Conversation``.

The forms are those of public data sets: ``{"messages"}``, ``{"prompt", "response"}``, Alpaca,
ShareGPT, questions with answers, preferences (also as the one text that the HH set has), message
trees. What each field is, ``forms`` tells; here its value is read and checked.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_irl.data.conversation import Conversation, Messages
from megatron_irl.data.forms import Form, Forms, Purpose
from megatron_irl.data.messages import (
    checked_message,
    checked_messages,
    checked_tools,
    text_of,
    tool_calls,
)
from megatron_irl.data.readers import EmptyAnswer, RecordError, kind_name
from megatron_irl.data.transcripts import has_turns, turns_of
from megatron_irl.data.trees import best_path, is_tree


class Normaliser:
    """Reads records for one purpose; knows what it has seen.

    Args:
        purpose: Decides what must be there: a demonstration ends with the assistant's turn, a
            prompt awaits it, a preference has two, and what is scored one or more.
        format, fields: As in ``Forms``.
    """

    def __init__(
        self, purpose: Purpose, format: str = "auto", fields: Mapping[str, str] | None = None
    ) -> None:
        self._purpose: Purpose = purpose
        self._forms = Forms(purpose, format, fields)

    def form(self, record: Mapping[str, Any]) -> Form:
        """Return the form of a record.

        Raises:
            RecordError: It has none that is known.
        """
        return self._forms.of(tuple([
            key for key, value in record.items()
            # NaN is how pandas writes what is not there.
            if value is not None and (type(value) is not float or value == value)]))

    def read(self, record: dict[str, Any], source: str) -> tuple[Form, list[Conversation]]:
        """Return the form of a record, and what it says.

        Returns:
            One conversation; for the purpose ``score`` one per response.

        Raises:
            RecordError: No form fits, or a value is not what its field should be.
        """
        if "prompt" in record or "text" in record:
            record = _opened(record)
        form = self.form(record)
        if self._purpose == "demonstration":
            asked = form.answer or form.response == "answer"
            answer = _answer(record, form) if asked else None
            conversations = [_demonstration(record, form, source, answer)]
        elif self._purpose == "preference":
            conversations = [_preference(record, form, source)]
        elif self._purpose == "prompt":
            conversations = [_prompt(record, form, source)]
        else:
            conversations = _scored(record, form, source)
        if form.tools or form.template_args:
            more = _extras(record, form)
            conversations = [replace(each, **more) for each in conversations]
        return form, conversations


def prompt_of(conversation: Conversation) -> str | Messages:
    """What comes before the last answer: a string where it is taken as it is, else messages."""
    messages = conversation.messages
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages[0]["content"] if conversation.plain else messages


def _opened(record: dict[str, Any]) -> dict[str, Any]:
    """Records that hide a conversation in a text or a tree, as ones with messages."""
    if is_tree(record):
        return {k: v for k, v in record.items() if k != "prompt"} | {
            "messages": best_path(record["prompt"])}
    text = record.get("text")
    if isinstance(text, str) and text.startswith("### Human:") and "messages" not in record:
        return {k: v for k, v in record.items() if k != "text"} | {"messages": turns_of(text)}
    return record


def _demonstration(
    record: dict[str, Any], form: Form, source: str, answer: str | None
) -> Conversation:
    if form.chosen:
        before, turns, plain = _sides(record, form, ("chosen",))
    elif form.messages:
        messages = _messages(record, form, form.messages)
        if form.system:
            messages = _with_system(messages, record, form)
        return Conversation(_complete(messages, form.messages), source, answer=answer)
    else:
        before, plain = _before(record, form)
        turns = _response(record, form, form.response)
    return Conversation([*before, *turns], source, answer=answer, plain=plain)


def _preference(record: dict[str, Any], form: Form, source: str) -> Conversation:
    before, (chosen, rejected), plain = _sides(record, form, ("chosen", "rejected"))
    return Conversation([*before, chosen], source, plain=plain, rejected=[*before, rejected])


def _prompt(record: dict[str, Any], form: Form, source: str) -> Conversation:
    if form.messages and not form.chosen:
        messages = _with_system(_messages(record, form, form.messages), record, form)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # the answer that is asked for
        if not messages:
            raise RecordError(f'"{form.messages}" has no turn before the answer')
        return Conversation(awaiting_assistant(messages), source)
    if form.chosen:
        before, _, plain = _sides(record, form, ("chosen",))
    else:
        before, plain = _before(record, form)
    return Conversation(before, source, plain=plain)


def _scored(record: dict[str, Any], form: Form, source: str) -> list[Conversation]:
    if form.chosen:
        names = ("chosen", "rejected") if form.rejected else ("chosen",)
        before, answers, plain = _sides(record, form, names)
    elif form.responses:
        if form.messages:
            asked = _prompt(record, form, source)
            before, plain = asked.messages, False
        else:
            before, plain = _before(record, form)
        values = record[form.responses]
        if not isinstance(values, list) or not values:
            raise RecordError(f'"{form.responses}" must be a non-empty list of strings')
        answers = [_answer_turn(value, f'"{form.responses}"[{i}]', form, allow_empty=True)
                   for i, value in enumerate(values)]
    elif form.messages:
        messages = _with_system(_messages(record, form, form.messages), record, form)
        return [Conversation(_complete(messages, form.messages), source)]
    else:
        before, plain = _before(record, form)
        turns = _response(record, form, form.response, allow_empty=True)
        return [Conversation([*before, *turns], source, plain=plain)]
    return [Conversation([*before, answer], source, plain=plain) for answer in answers]


def _before(record: dict[str, Any], form: Form) -> tuple[Messages, bool]:
    """The turns before the response, and whether they are a string taken as it is."""
    value = record[form.prompt]
    if isinstance(value, list):
        messages = checked_messages(value, form.prompt, form.role, form.content)
        if not messages:
            raise RecordError(f'"{form.prompt}" is empty')
        return awaiting_assistant(_with_system(messages, record, form)), False
    text = text_of(value, f'"{form.prompt}"')
    if form.context:
        context = text_of(record[form.context], f'"{form.context}"', allow_empty=True)
        text = f"{text}\n\n{context}" if context.strip() else text
    return _with_system([{"role": "user", "content": text}], record, form), form.plain


def _sides(
    record: dict[str, Any], form: Form, names: tuple[str, ...]
) -> tuple[Messages, list[dict[str, Any]], bool]:
    """The turns before the answers, the answers, and whether the prompt is taken as it is."""
    befores, answers = [], []
    for name in names:
        key = getattr(form, name)
        before, answer = _side(record[key], key, form)
        befores.append(before)
        answers.append(answer)
    told = [before for before in befores if before]
    if any(before != told[0] for before in told):
        raise RecordError('the messages before the answer differ between "chosen" and "rejected"')
    if not told:
        if form.messages:
            messages = _with_system(_messages(record, form, form.messages), record, form)
            return awaiting_assistant(messages), answers, False
        if not form.prompt:
            raise RecordError('no "prompt"')
        before, plain = _before(record, form)
        return before, answers, plain
    before = awaiting_assistant(told[0])
    if form.prompt:
        _check_same_prompt(record, form, before)
    return _with_system(before, record, form), answers, False


def _check_same_prompt(record: dict[str, Any], form: Form, before: Messages) -> None:
    prompt = record[form.prompt]
    if isinstance(prompt, str):
        same = text_of(prompt, f'"{form.prompt}"') == before[-1]["content"] or (
            has_turns(prompt) and turns_of(prompt)[: len(before)] == before
        )
        # UltraFeedback's kind: the conversation's first turn.
        same = same or prompt == next(m["content"] for m in before if m["role"] != "system")
    else:
        same = _before(record, form)[0] == before
    if not same:
        raise RecordError(f'"{form.prompt}" differs from the messages before the answer')


def _side(value: Any, key: str, form: Form) -> tuple[Messages, dict[str, Any]]:
    """The conversation before an answer (empty where the record does not repeat it), and it."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        if not (isinstance(value, str) and has_turns(value)):
            text = text_of(value, f'"{key}"', empty=EmptyAnswer)
            return [], {"role": "assistant", "content": text}
        value = turns_of(value)
    messages = checked_messages(value, key, form.role, form.content)
    if not messages:
        raise RecordError(f'"{key}" is empty')
    if messages[-1]["role"] != "assistant":
        raise RecordError(f'the last message of "{key}" is from {messages[-1]["role"]!r}; it must '
                          "be the assistant's")
    try:
        _check_answer(messages[-1])
    except EmptyAnswer as error:
        raise EmptyAnswer(f'the last message of "{key}": {error}') from None
    return messages[:-1], messages[-1]


def _response(
    record: dict[str, Any], form: Form, key: str, allow_empty: bool = False
) -> Messages:
    """The turns of a response: nearly always one."""
    value = record[key]
    if form.tools and key in ("answers", "output") and str(value).lstrip()[:2] in ("[{", '{"'):
        return [{"role": "assistant", "content": "", "tool_calls": tool_calls(value, f'"{key}"')}]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        turns = checked_messages(value, key, form.role, form.content)
        if turns[-1]["role"] != "assistant":
            raise RecordError(f'the last message of "{key}" is from {turns[-1]["role"]!r}; it must '
                              "be the assistant's")
        _check_answer(turns[-1])
        return turns
    return [_answer_turn(value, f'"{key}"', form, allow_empty)]


def _answer_turn(value: Any, name: str, form: Form, allow_empty: bool) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, dict):
        message = checked_message(value, name.strip('"'), form.role, form.content)
        if message["role"] != "assistant":
            raise RecordError(f"{name} is from {message['role']!r}; it must be the assistant's")
        return message
    return {"role": "assistant", "content": text_of(value, name, allow_empty, EmptyAnswer)}


def _messages(record: dict[str, Any], form: Form, key: str) -> Messages:
    return checked_messages(record[key], key, form.role, form.content)


def _complete(messages: Messages, key: str) -> Messages:
    """Return the messages if they are a demonstration: something asked, and answered last."""
    if not messages:
        raise RecordError(f'"{key}" is empty')
    if messages[-1]["role"] != "assistant":
        raise RecordError(f'the last message is from {messages[-1]["role"]!r}; it must be the '
                          "assistant's")
    awaiting_assistant(messages[:-1])
    _check_answer(messages[-1])
    return messages


def _check_answer(message: dict[str, Any]) -> None:
    text = message["content"]
    if (not text or text.isspace()) and not message.get("tool_calls"):
        raise EmptyAnswer('"content" is empty')


def awaiting_assistant(messages: Messages) -> Messages:
    """Return the messages if they can be a prompt: some text, and not the assistant's turn done."""
    for message in messages:
        if message["content"] and not message["content"].isspace():
            break
    else:
        raise RecordError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise RecordError("the prompt ends with an assistant message; nothing is left to answer")
    return messages


def _with_system(messages: Messages, record: dict[str, Any], form: Form) -> Messages:
    """Put the record's own system text first, unless there is a system turn already."""
    if not form.system or (messages and messages[0]["role"] == "system"):
        return messages
    text = text_of(record[form.system], f'"{form.system}"', allow_empty=True)
    return [{"role": "system", "content": text}, *messages] if text.strip() else messages


def _extras(record: dict[str, Any], form: Form) -> dict[str, Any]:
    arguments = record.get(form.template_args) or {}
    if not isinstance(arguments, dict):
        raise RecordError(f'"{form.template_args}" must be an object, not {kind_name(arguments)}')
    tools = checked_tools(record[form.tools], form.tools) if form.tools else None
    return {"tools": tools, "template_args": arguments}


def _answer(record: dict[str, Any], form: Form) -> str | None:
    """The reference answer for exact match: its own field, or what follows "####" (GSM8K)."""
    if form.response == "answer":
        text = record["answer"]
        _, mark, last = text.rpartition("####") if isinstance(text, str) else ("", "", "")
        return last.strip() if mark and last.strip() else None
    answer = record[form.answer]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise RecordError(f'"{form.answer}" must be a string or a number, not {kind_name(answer)}')
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise RecordError(f'"{form.answer}" must be finite, not {answer}')
        if answer.is_integer():  # a column of integers, one missing, becomes one of floats
            return str(int(answer))
    return str(answer)
