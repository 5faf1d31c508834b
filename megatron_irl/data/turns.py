"""Which of a conversation's assistant turns are learnt: the last, each alone, or all at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_irl.data.codec import Split, split_each
from megatron_irl.data.conversation import Conversation
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import Encoded, encode_conversations
from megatron_irl.data.structured_fields import check_structure
from megatron_irl.data.tokenizer import Tokenizer

Turns = Literal["last", "each", "all"]
Turned = list[tuple[Conversation, Encoded]]
"""What is learnt of one record."""

TURNS_REMARKS = {
    "unmarked_end": "have turns whose end the chat template's generation markers leave out; what "
                    "is learnt there has no end",
    "unstable_turns": "have earlier turns that the chat template renders differently once others "
                      "follow; each of their turns is a record of its own, as under "
                      "data.turns=each",
}  # fmt: skip


def conversations_of(conversation: Conversation, turns: Turns) -> list[Conversation]:
    """Return what is learnt of a conversation as conversations that end with their answer.

    Under ``each`` there is one for every assistant turn that answers something; the reference
    answer belongs to the last. ``source`` names the turn of the others: no two are the same.
    """
    messages = conversation.messages
    if turns == "last" or conversation.plain:
        return [conversation]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > 0]
    return [
        conversation if i == len(messages) - 1 else replace(
            conversation, messages=messages[: i + 1], answer=None,
            source=f"{conversation.source} turn {number}")
        for number, i in enumerate(answers, start=1)
    ]  # fmt: skip


def encode_turns(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], turns: Turns
) -> list[Turned | RecordError]:
    """Return what is learnt of each conversation as ids, all of them encoded together.

    Under ``all`` a conversation is one sequence with a span for every turn. The template's
    generation markers say where they are, if it has any; they are then exactly those of
    transformers' ``return_assistant_tokens_mask``. Otherwise each turn is rendered as the end of
    its own conversation, and the ids of that must be the beginning of the whole's: a template that
    rewrites earlier turns (thinking left out, say) falls back to ``each``.

    Raises:
        UserError: A conversation needs the chat template, and there is none.
    """
    if turns == "all" and tokenizer.template is not None and tokenizer.template.has_markers:
        return _all_marked(tokenizer, conversations)
    parts = [conversations_of(conversation, turns) for conversation in conversations]
    encoded = iter(encode_conversations(tokenizer, [c for part in parts for c in part]))
    results: list[Turned | RecordError] = []
    for conversation, part in zip(conversations, parts, strict=True):
        found = [(each, next(encoded)) for each in part]
        error = next((e for _, e in found if isinstance(e, RecordError)), None)
        good = [(each, e) for each, e in found if isinstance(e, Encoded)]
        if error is not None:
            results.append(error)
        elif turns == "all" and len(good) > 1:
            results.append(_joined(conversation, good))
        else:
            results.append(good)
    return results


def _joined(conversation: Conversation, turns: Turned) -> Turned:
    """One sequence of all turns where every turn's ids begin the whole's, else the turns."""
    whole = turns[-1][1]
    if any(each.ids != whole.ids[: len(each.ids)] for _, each in turns):
        return [(c, replace(e, remarks=(*e.remarks, "unstable_turns"))) for c, e in turns]
    remarks = dict.fromkeys(remark for _, each in turns for remark in each.remarks)
    spans = [each.spans[0] for _, each in turns]
    return [(conversation, Encoded(whole.ids, spans, tuple(remarks)))]


def _all_marked(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[Turned | RecordError]:
    """Conversations whose template marks what the assistant generates."""
    plain = iter(encode_conversations(tokenizer, [c for c in conversations if c.plain]))
    texts = [None if c.plain else _rendered_with_marks(tokenizer, c) for c in conversations]
    splits = iter(split_each(tokenizer.codec, [t for t in texts if isinstance(t, tuple)]))
    results: list[Turned | RecordError] = []
    for conversation, text in zip(conversations, texts, strict=True):
        if isinstance(text, tuple):
            encoded = _marked(tokenizer, next(splits))
        else:
            encoded = next(plain) if text is None else text
        results.append(
            encoded if isinstance(encoded, RecordError) else [(conversation, encoded)])
    return results


def _rendered_with_marks(
    tokenizer: Tokenizer, conversation: Conversation
) -> tuple[str, list[int]] | RecordError:
    """The text, and where what is generated begins and ends, in turn."""
    try:
        template = tokenizer.require_chat_template()
        check_structure(template, conversation)
        text, marked = template.render(
            conversation.messages, tools=conversation.tools,
            arguments=conversation.template_args, with_spans=True)
        positions = [position for start, end in marked if end > start for position in (start, end)]
        if not positions:
            raise RecordError("the chat template marks nothing of it as generated")
    except RecordError as error:
        return error
    return text, positions


def _marked(tokenizer: Tokenizer, split: Split | RecordError) -> Encoded | RecordError:
    if isinstance(split, RecordError):
        return split
    # A token that reaches over a border belongs to the answer, as transformers counts it.
    starts = split.counts[0::2]
    ends = [count + bool(missing)
            for count, missing in zip(split.counts[1::2], split.missing[1::2], strict=True)]
    ids, spans = split.ids[: ends[-1]], list(zip(starts, ends, strict=True))
    if spans[0][0] < 1:
        return RecordError("the prompt has no tokens")
    try:
        tokenizer.check_ids(ids)
    except RecordError as error:
        return error
    is_open = any(ids[end - 1] not in tokenizer.stop_ids for _, end in spans)
    return Encoded(ids, spans, ("unmarked_end",) if is_open else ())
