"""Which form a record has: told by the names of its fields, or by the recipe.

A form says which field is the conversation, the prompt, the response, and so on. Records of several
forms may stand in one file.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_irl.data.readers import RecordError
from megatron_irl.errors import UserError

Purpose = Literal["demonstration", "preference", "prompt", "score"]

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog")
# Where a prompt and its response are fields of their own: (prompt, its context, response), each
# with the names it goes by; the first pair that a record has all of is taken. Strings of the
# first line are taken as they are, those of the others are turns of a chat.
_PLAIN = (("prompt",), (), ("response", "completion"))
_PAIRS = (
    (("instruction",), ("input", "context"), ("output", "response", "completion")),
    (("question",), ("context",), ("response", "solution", "answer", "output")),
    (("query",), ("context",), ("response", "answer", "output", "answers")),
    (("problem",), (), ("solution", "generated_solution", "response", "answer", "output")),
    (("prompt",), ("context",), ("output", "answer", "solution")),
    (("input",), (), ("output", "target")),
    (("inputs",), (), ("targets", "outputs", "labels")),
)
_OPTIONAL = {
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "template_args": ("chat_template_kwargs",),
}
RESPONSES = ("responses", "completions")
# data.fields: what a user may call them → what they are.
FIELD_NAMES = {
    "messages": "messages", "conversations": "messages", "role": "role", "from": "role",
    "content": "content", "value": "content", "prompt": "prompt", "question": "prompt",
    "instruction": "prompt", "context": "context", "input": "context", "response": "response",
    "completion": "response", "output": "response", "chosen": "chosen", "rejected": "rejected",
    "responses": "responses", "system": "system", "tools": "tools", "answer": "answer",
}  # fmt: skip
_CHAT_NAMES = {"question", "instruction", "input", "output"}  # ask for turns of a chat


@dataclass(frozen=True)
class Form:
    """The fields of a record by what they are; an empty name: it has none.

    Attributes:
        format: The value of ``data.format`` that asks for it.
        plain: A string prompt is taken as it is, past the chat template.
        role, content: Fields of a message, where they have no usual name.
    """

    format: str
    messages: str = ""
    prompt: str = ""
    context: str = ""
    response: str = ""
    responses: str = ""
    chosen: str = ""
    rejected: str = ""
    system: str = ""
    tools: str = ""
    answer: str = ""
    template_args: str = ""
    role: str = ""
    content: str = ""
    plain: bool = False

    @cached_property
    def description(self) -> str:
        """Name the form and its fields, for the log."""
        names = ("messages", "system", "prompt", "context", "response", "responses", "chosen",
                 "rejected", "tools", "answer")
        fields = [getattr(self, name) for name in names if getattr(self, name)]
        return f"{self.format} ({', '.join(fields)})"


class Forms:
    """Tells the form of records, each set of field names once.

    Args:
        purpose: What the records are read for; a prompt needs no response, say.
        format: ``auto``, or the one form that is looked for.
        fields: Our names → the record's, as in ``FIELD_NAMES``.
    """

    def __init__(
        self, purpose: Purpose, format: str = "auto", fields: Mapping[str, str] | None = None
    ) -> None:
        self._purpose, self._format = purpose, format
        self._on_command_line = purpose in ("prompt", "score")
        self._given: dict[str, str] = {}
        self._asks_chat = False
        for name, theirs in (fields or {}).items():
            check_field_name(name)
            self._given[FIELD_NAMES[name]] = theirs
            self._asks_chat |= name in _CHAT_NAMES
        # Both are text of question-answer sets: there ``answer`` is what the model is to say.
        if "question" in (fields or {}) and "response" not in self._given:
            if "answer" in self._given:
                self._given["response"] = self._given.pop("answer")
        if purpose == "prompt":  # what was answered is not asked for
            for name in ("response", "rejected", "answer"):
                self._given.pop(name, None)
        self._known: dict[tuple[str, ...], Form] = {}

    def of(self, present: tuple[str, ...]) -> Form:
        """Return the form of a record whose fields ``present`` are not null.

        Raises:
            RecordError: No form fits; the message says what is there and what to write.
        """
        form = self._known.get(present)
        if form is None:
            form = self._known[present] = self._find(set(present))
        return form

    def _find(self, present: Collection[str]) -> Form:
        given = self._given
        for name, theirs in given.items():
            if name in ("messages", "prompt", "response", "chosen", "rejected", "responses"):
                if theirs not in present:
                    key = f"--field {name}" if self._on_command_line else f"data.fields.{name}"
                    raise RecordError(f'no "{theirs}", which {key} names; its keys are: '
                                      f"{_listed(present)}")
        own = {name for name in given if name not in (*_OPTIONAL, "answer", "role", "content",
                                                      "context")}
        for form in self._candidates(present):
            if all(getattr(form, name) for name in own):
                return form
        how = "--field prompt=THEIR_NAME" if self._on_command_line else (
            "data.fields={prompt: THEIR_NAME, response: THEIR_NAME}")
        raise RecordError(self._nothing_fits(present), f"{_ADVICE}, as in {how}.")

    def _candidates(self, present: Collection[str]) -> list[Form]:
        """The forms that the fields allow, in the order in which they are preferred."""
        forms = [*self._with_messages(present), *self._with_responses(present),
                 *self._with_sides(present), *self._with_pairs(present)]
        order = {
            # Every file of preferences can be learnt from: by its better answers.
            "demonstration": ("messages", "sharegpt", "prompt_response", "alpaca", "preference"),
            "prompt": ("messages", "sharegpt", "prompt_response", "alpaca", "preference"),
            # What ``generate`` wrote has a response beside the conversation it was given.
            "score": ("responses", "prompt_response", "messages", "sharegpt", "alpaca",
                      "preference"),
            "preference": ("preference",),
        }[self._purpose]
        if self._format != "auto":
            both = ("messages", "sharegpt")
            wanted = both if self._format in both else (self._format, "responses")
            order = tuple(name for name in order if name in wanted)
        return sorted((f for f in forms if f.format in order), key=lambda f: order.index(f.format))

    def _with_messages(self, present: Collection[str]) -> list[Form]:
        key = self._key("messages", MESSAGES, present)
        # ShareGPT's preferences: the conversation is what comes before the two answers.
        sides = key == "conversations" and {"chosen", "rejected"} <= set(present)
        if not key or sides:
            return []
        format = "sharegpt" if key == "conversations" else "messages"
        return [self._form(format, present, messages=key)]

    def _with_responses(self, present: Collection[str]) -> list[Form]:
        responses = self._key("responses", RESPONSES, present)
        prompt = self._key("prompt", ("prompt", "question", "instruction", "query"), present)
        messages = "" if prompt else self._key("messages", MESSAGES, present)
        if not responses or not (prompt or messages):
            return []
        return [self._form("responses", present, prompt=prompt, messages=messages,
                           responses=responses, plain=prompt == "prompt")]

    def _with_sides(self, present: Collection[str]) -> list[Form]:
        chosen = self._key("chosen", ("chosen",), present)
        rejected = self._key("rejected", ("rejected",), present)
        needed = (chosen, rejected) if self._purpose == "preference" else (chosen,)
        if not all(needed):
            return []
        prompt = self._key("prompt", ("prompt", "question", "instruction", "query"), present)
        messages = "" if prompt else self._key("messages", MESSAGES, present)
        context = self._key("context", ("input",), present) if prompt == "instruction" else ""
        return [self._form("preference", present, chosen=chosen, rejected=rejected, prompt=prompt,
                           messages=messages, context=context, plain=prompt == "prompt")]

    def _with_pairs(self, present: Collection[str]) -> list[Form]:
        forms = []
        for prompts, contexts, responses in (_PLAIN, *_PAIRS):
            prompt = self._key("prompt", prompts, present)
            response = self._key("response", responses, present)
            if not prompt or not (response or self._purpose == "prompt"):
                continue
            plain = (prompts, contexts, responses) == _PLAIN and not self._asks_chat
            context = self._key("context", contexts, present)
            forms.append(self._form(
                "prompt_response" if plain else "alpaca", present, prompt=prompt, context=context,
                response=response, plain=plain))
            if self._asks_chat and (prompts, contexts, responses) == _PLAIN:
                break  # every later pair would find the same fields
        return forms

    def _form(self, format: str, present: Collection[str], **fields: object) -> Form:
        optional = {name: self._key(name, usual, present) for name, usual in _OPTIONAL.items()}
        answer = self._key("answer", ("answer",), present)
        if answer not in fields.values():
            optional["answer"] = answer
        if optional["system"]:
            fields["plain"] = False  # a system turn is one of a chat
        given = {name: self._given.get(name, "") for name in ("role", "content")}
        return Form(format, **(optional | given | fields))  # pyright: ignore[reportArgumentType]

    def _key(self, name: str, usual: tuple[str, ...], present: Collection[str]) -> str:
        """The record's field for ``name``: the one given, or else the first usual one it has."""
        if self._given.get(name):
            return self._given[name] if self._given[name] in present else ""
        taken = set(self._given.values())
        return next((key for key in usual if key in present and key not in taken), "")

    def _nothing_fits(self, present: Collection[str]) -> str:
        keys = f"its keys are: {_listed(present)}"
        needed = ("chosen", "rejected")
        if self._purpose == "preference":
            missing = [f'"{key}"' for key in needed if key not in present]
            return f"no {' and no '.join(missing)}; {keys}"
        pairs = {"auto": (_PLAIN, *_PAIRS), "prompt_response": (_PLAIN,), "alpaca": _PAIRS}
        half = [(p, r) for prompts, _, responses in pairs.get(self._format, ())
                for p in prompts for r in responses if (p in present) != (r in present)]
        wanted = "" if self._format == "auto" else f" of data.format={self._format}"
        if self._purpose == "score":
            return (f'nothing to score{wanted}: no "responses" or "response" to a "prompt", and '
                    f'no "messages"; {keys}')
        if half:
            prompt, response = half[0]
            missing = response if prompt in present else prompt
            return f'no "{missing}"{wanted}; {keys}'
        return (f'neither "messages" nor "prompt" and "response", nor another form that is '
                f"known{wanted}; {keys}")


_ADVICE = ('Write {"messages": [{"role", "content"}...]} or {"prompt", "response"}, or name the '
           "fields")


def check_field_name(name: str) -> None:
    """Raise UserError unless ``name`` is one that ``data.fields`` can map, naming the nearest."""
    if name not in FIELD_NAMES:
        near = difflib.get_close_matches(name, FIELD_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(FIELD_NAMES)}."
        raise UserError(f"unknown key data.fields.{name}; {hint} data.fields (on the command line "
                        "--field) maps our names to those of the file.")


def _listed(present: Collection[str]) -> str:
    return ", ".join(sorted(map(str, present))) or "none"
