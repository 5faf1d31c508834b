"""The one door for text: a conversation is rendered and encoded once, as a whole.

Prompt and response are parts of that one id sequence: the prompt is what generation is given (the
conversation before the answer, with the assistant's header), the response is everything after it up
to and including the token that ends the turn. Nothing is ever encoded by itself and pasted behind
something else: a tokenizer would put other tokens at the seam, and a template other text.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_irl.data.codec import Split, split_each
from megatron_irl.data.conversation import Conversation
from megatron_irl.data.readers import EmptyAnswer, RecordError
from megatron_irl.data.structured_fields import check_structure, rendered
from megatron_irl.data.tokenizer import Tokenizer

# What a record shows that the user should hear of once, with how many records it concerns.
REMARKS = {
    "header": "have no answer that begins as the generation prompt ends; their prompts are cut "
              "before the difference",
    "merged": "have a prompt whose end is one token with the answer's beginning; that token is "
              "learnt with the answer",
    "altered": "have an answer that the chat template does not write as it stands",
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        ids: Up to and including the last counted token.
        spans: (start, end) positions in ``ids`` of what is learnt, ascending; one of them but for
            ``data.turns: all``. What is before the first is the prompt.
        remarks: Keys of ``REMARKS``.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    remarks: tuple[str, ...] = ()

    @property
    def prompt_ids(self) -> list[int]:
        """What generation continues."""
        return self.ids[: self.spans[0][0]]

    @property
    def response_ids(self) -> list[int]:
        """What is learnt; under ``data.turns: all`` with the turns of others in between."""
        return self.ids[self.spans[0][0] :]


@dataclass
class Text:
    """A conversation on its way to ids: rendered, not encoded yet.

    Attributes:
        text: The whole of it.
        position: Where its answer begins, in characters.
        conversation: What it was rendered from.
        remarks: As in ``Encoded``.
    """

    text: str
    position: int
    conversation: Conversation
    remarks: list[str] = field(default_factory=list)


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, allow_empty: bool = False
) -> list[Encoded | RecordError]:
    """Return the ids of conversations that end with an answer, encoded all together.

    Args:
        tokenizer: The model's.
        conversations: The last message of each is the assistant's.
        allow_empty: An answer may be its end alone.

    Returns:
        For each its ids, or what is wrong with it.

    Raises:
        UserError: A conversation needs the chat template, and there is none.
    """
    texts: list[Text | RecordError] = []
    for conversation in conversations:
        try:
            texts.append(render_conversation(tokenizer, conversation))
        except RecordError as error:
            texts.append(error)
    ready: list[tuple[str, Sequence[int]]] = [
        (t.text, (t.position,)) for t in texts if isinstance(t, Text)
    ]
    splits = iter(split_each(tokenizer.codec, ready))
    encoded: list[Encoded | RecordError] = []
    for text in texts:
        try:
            if isinstance(text, RecordError):
                raise text
            split = next(splits)
            if isinstance(split, RecordError):
                raise split
            encoded.append(_encoded(tokenizer, text, split, allow_empty))
        except RecordError as error:
            encoded.append(error)
    return encoded


def encode_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids after which the model is to answer: those that training would have as prompt.

    Messages go through the chat template with the assistant's header appended; a plain prompt is
    taken as it is, with one BOS in front if the tokenizer adds one by default.

    Args:
        conversation: Without the answer.

    Raises:
        UserError: Messages, but no chat template.
        RecordError: The template refuses or leaves out what the conversation has, or the model
            has no embedding for a token.
    """
    if conversation.plain:
        ids = with_bos(tokenizer, tokenizer.encode(conversation.messages[0]["content"]))
        tokenizer.check_ids(ids)
        return ids
    template = tokenizer.require_chat_template()
    check_structure(template, conversation)
    text = rendered(template, conversation, conversation.messages, True)
    header = tokenizer.shape.header
    if header and text.endswith(header):
        text = text[: -len(header)]
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - tokenizer.shape.unstable]
    tokenizer.check_ids(ids)
    return ids


def render_conversation(tokenizer: Tokenizer, conversation: Conversation) -> Text:
    """Return the text of a conversation and where its answer begins.

    Raises:
        UserError: Messages, but no chat template.
        RecordError: The template refuses the messages, leaves out a part of them, or renders what
            comes before the answer differently once the answer is there.
    """
    if conversation.plain:
        prompt, response = (m["content"] for m in conversation.messages)
        return Text(prompt + response, len(prompt), conversation)
    template = tokenizer.require_chat_template()
    check_structure(template, conversation)
    messages = conversation.messages
    prompt = rendered(template, conversation, messages[:-1], True)
    whole = rendered(template, conversation, messages, False)
    space = tokenizer.shape.tail_space  # an answer ends with EOS, not with EOS after a line break
    if space and whole.endswith(space):
        whole = whole[: -len(space)]
    text = Text(whole, len(prompt), conversation)
    if not whole.startswith(prompt):
        before = rendered(template, conversation, messages[:-1], False)
        text.position = answer_position(prompt, before, whole)
        text.remarks.append("header")
    answer = messages[-1]["content"].strip()
    if answer and answer not in whole[text.position :]:
        text.remarks.append("altered")
    return text


def answer_position(prompt: str, before: str, whole: str) -> int:
    """Return where the answer begins in a text that does not begin with the generation prompt.

    Args:
        prompt: The conversation before the answer, with the generation prompt.
        before: The same without it.
        whole: With the answer.

    Raises:
        RecordError: Not even what comes before the generation prompt is the same.
    """
    position = len(os.path.commonprefix([prompt, whole]))
    if position < len(before) and not before.isspace():
        there = max(position - 20, 0)
        raise RecordError(
            "the chat template renders what comes before the answer differently once the answer is "
            f"there: {prompt[there : position + 40]!r} becomes {whole[there : position + 40]!r}. "
            "No prompt would lead to this answer; set data.chat_template to one that keeps the "
            "conversation as it is"
        )
    return position


def _encoded(tokenizer: Tokenizer, text: Text, split: Split, allow_empty: bool) -> Encoded:
    """Cut the ids at the end of the turn and tell the prompt from the response."""
    (count,), (missing,) = split.counts, split.missing
    ids, remarks, plain = split.ids, text.remarks, text.conversation.plain
    unstable = 0 if plain else tokenizer.shape.unstable
    if missing > unstable:
        remarks = [*remarks, "merged"]
    start = count - max(unstable - missing, 0)
    if plain:
        bos = len(with_bos(tokenizer, ids)) - len(ids)
        ids, start = with_bos(tokenizer, ids), start + bos
    response = turn_ids(tokenizer, ids[start:], plain=plain)
    if start < 1:
        is_merged = count + missing > 0
        raise RecordError("the prompt and the beginning of its answer are one token; write a space "
                          "between them" if is_merged else "the prompt has no tokens")
    if len(response) == 1 and not allow_empty:
        raise EmptyAnswer("the response has no tokens")
    ids = ids[:start] + response
    tokenizer.check_ids(ids)
    return Encoded(ids, [(start, len(ids))], tuple(remarks))


def turn_ids(tokenizer: Tokenizer, ids: list[int], *, plain: bool) -> list[int]:
    """Return the ids of an answer, which ``ids`` begins with, its end included exactly once.

    Raises:
        RecordError: The answer spells out a stop token before its end; a sample would have ended
            there, so what follows could never be generated.
    """
    shape, stops = tokenizer.shape, tokenizer.stop_ids
    ends_by_template = not plain and shape.end_id is not None
    if not ends_by_template:
        ids = list(ids)
        while ids and ids[-1] == tokenizer.eos_id:
            ids.pop()
        ids.append(tokenizer.eos_id)
    end = next((n for n, i in enumerate(ids) if i in stops), None)
    if end is None:
        raise RecordError("the chat template writes no end-of-turn token after the answer")
    rest = ids[end + 1 :]
    if ends_by_template and tuple(rest) != shape.tail_ids and tokenizer.decode(rest).strip():
        raise RecordError("the response holds an end-of-response token inside its text")
    if not ends_by_template and rest:
        raise RecordError("the response holds an end-of-response token inside its text")
    return ids[: end + 1]


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """``ids`` with one BOS in front, if the tokenizer adds one to plain text."""
    bos_id = tokenizer.bos_id
    if not tokenizer.adds_bos or bos_id is None or ids[:1] == [bos_id]:
        return ids
    return [bos_id, *ids]
