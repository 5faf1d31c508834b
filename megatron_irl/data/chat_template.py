"""A chat template: messages in, text out, with whatever goes wrong inside it told to the user."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

# The environment that transformers renders in (its filters, its sandbox, the generation tag) is the
# definition of a chat template; what is private here is pinned with the library's version.
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
    _render_with_assistant_indices,  # pyright: ignore[reportPrivateUsage]
)

from megatron_irl.data.conversation import Messages
from megatron_irl.data.readers import RecordError
from megatron_irl.errors import UserError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what was thought before the answer."""


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: As transformers' ``apply_chat_template`` gives it.
        spans: (start, end) in characters of what the template's generation markers enclose; empty
            if it has none.
    """

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja text with what it is rendered with.

    Attributes:
        text: The template.
        special_tokens: ``bos_token`` and so on, by the names that templates use.
        arguments: Further variables of every rendering (``data.chat_template_args``).
        date: What ``strftime_now`` says the time is. Fixed when a run starts: a template that
            prints the date would otherwise make other data of the same records tomorrow.
    """

    text: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime = field(default_factory=datetime.now)

    @property
    def has_markers(self) -> bool:
        """Whether it marks what the assistant generates ({% generation %})."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    @property
    def prints_date(self) -> bool:
        """Whether what it writes may depend on the day."""
        return "strftime_now" in self.text

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """Variables that are the same in every rendering, globals of the environment included."""
        return {
            **_compile_jinja_template(self.text).globals, "documents": None,
            "strftime_now": self.date.strftime, **self.special_tokens,
        }  # fmt: skip

    def check(self, name: str) -> None:
        """Raise UserError unless the text is Jinja.

        Args:
            name: Where it comes from.
        """
        try:
            _compile_jinja_template(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{name}: the chat template is not Jinja: {error.message} (line {error.lineno} of "
                "the template). Set data.chat_template to another one."
            ) from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        with_spans: bool = False,
    ) -> Rendered:
        """Return the text of ``messages``.

        Args:
            messages: Null fields left out.
            add_generation_prompt: End with the assistant's header, where the template has one.
            tools: On offer.
            arguments: Of this conversation; they win over the template's own.
            with_spans: Fill ``Rendered.spans``; costs a little.

        Raises:
            RecordError: The template refuses the messages, or fails on them.
        """
        variables = {
            **self._constants, "messages": _with_reasoning_aliases(messages), "tools": tools,
            "add_generation_prompt": add_generation_prompt, **self.arguments, **(arguments or {}),
        }  # fmt: skip
        # Any exception: the template is a program of the user's, and whatever it raises, a
        # TypeError on a message that lacks a field as well as its own raise_exception, is about
        # this record. Nothing of ours runs inside.
        try:
            compiled = _compile_jinja_template(self.text)
            if with_spans:
                return Rendered(*_render_with_assistant_indices(compiled, **variables))
            try:
                # As ``compiled.render``, which puts globals and variables together anew each time.
                environment = compiled.environment
                context = environment.context_class(
                    environment, variables, compiled.name, compiled.blocks)
                return Rendered("".join(compiled.root_render_func(context)), [])
            except Exception:
                # Once more in the long way, which finds the template's line that it came from.
                return Rendered(compiled.render(**variables), [])
        except jinja2.UndefinedError as error:
            raise RecordError(_failed(error, messages)) from error
        except jinja2.TemplateError as error:
            raise RecordError(f"the chat template refuses the messages: {error}"
                              f"{_system_advice(messages)}") from error
        except Exception as error:
            raise RecordError(_failed(error, messages)) from error


def _with_reasoning_aliases(messages: Messages) -> Messages:
    """The messages with their reasoning under every name that templates read, as transformers."""
    for message in messages:
        if len(message) > 2 and any(name in message for name in REASONING_FIELDS):
            break
    else:  # nearly always: role and content
        return messages
    aliased: Messages = []
    for message in messages:
        found = [message[name] for name in REASONING_FIELDS if message.get(name) is not None]
        if found:
            message = {"thinking": found[0], **message, "reasoning_content": found[0]}
        aliased.append(message)
    return aliased


def _failed(error: Exception, messages: Messages) -> str:
    lines = _template_lines(error)
    where = f" (line {lines[-1]} of the template)" if lines else ""
    fields = sorted({key for message in messages for key in message} - {"role", "content"})
    has = f"; the messages have {', '.join(fields)} beside role and content" if fields else ""
    return f"the chat template fails on the messages{where}: {type(error).__name__}: {error}{has}"


def _template_lines(error: Exception) -> list[int]:
    """Lines of the template that the error passed through, the innermost last."""
    lines: list[int] = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines


def _system_advice(messages: Messages) -> str:
    if messages and messages[0].get("role") == "system":
        return (". It may know no system turn: put that text into the first user's, or set "
                "data.chat_template to one that does")
    return ""
