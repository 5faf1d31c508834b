"""What a chat template does around an assistant's turn, learnt by rendering a few short ones."""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

from megatron_irl.data.chat_template import ChatTemplate
from megatron_irl.data.codec import Codec, text_after
from megatron_irl.data.readers import RecordError
from megatron_irl.errors import UserError

# Answers begin with a word or a number; what stands at a prompt's end must not depend on which.
PROBES = ("paris", "7", "yes")
ASK = {"role": "user", "content": "hello"}


@dataclass(frozen=True)
class TurnShape:
    """How a template writes the assistant's turn.

    Attributes:
        end_id: The token that it puts after the answer; None if it puts none.
        tail_ids: What it writes after that token at the end of a conversation.
        tail_space: White space at the conversation's end where there is no ``end_id``; not learnt.
        shown_lead, shown_tail: What is decoded before and after every answer, and is none of it.
        lead: Text between the generation prompt and the answer ("" as a rule): the template writes
            it, so the model learns to.
        header: End of the generation prompt that a finished conversation does not have. It is left
            out of every prompt, since no demonstration would have it.
        unstable: Ids at the prompt's end that become others once an answer follows; they are left
            out of every prompt and learnt as part of the answer.
        notes: What the user should know about it, each a sentence.
    """

    end_id: int | None = None
    tail_ids: tuple[int, ...] = ()
    tail_space: str = ""
    shown_lead: str = ""
    shown_tail: str = ""
    lead: str = ""
    header: str = ""
    unstable: int = 0
    notes: tuple[str, ...] = ()


def learn_shape(template: ChatTemplate, codec: Codec, stop_ids: Collection[int]) -> TurnShape:
    """Render and encode a question with each of a few answers, and compare with the prompt.

    A template that refuses so simple a conversation (it may demand a system turn, or tools) is
    known to us by its records only: what they show is found at each of them.

    Raises:
        UserError: The template begins an answer with the very token that ends it.
    """
    try:
        before = template.render([ASK]).text
        prompt = template.render([ASK], add_generation_prompt=True).text
        wholes = [template.render([ASK, _answer(probe)]).text for probe in PROBES]
    except RecordError as error:
        return TurnShape(notes=(f"{error}. Tried was a question and an answer; records will show",))
    starts = [w.lower().rfind(probe) for w, probe in zip(wholes, PROBES, strict=True)]
    if min(starts) < 0:
        return TurnShape(notes=("the chat template leaves out the assistant's answer",))
    # Up to here the prompt and the finished conversation are one text; all of it, as a rule.
    position = len(os.path.commonprefix([prompt, wholes[0]]))
    header = _missing_header(template, prompt, position)
    splits = codec.split_batch([
        (whole, [position, start + len(probe)])
        for whole, start, probe in zip(wholes, starts, PROBES, strict=True)
    ])
    ids, (begin, until) = splits[0].ids, splits[0].counts
    end = next((i for i in ids[until:] if i in stop_ids or i in codec.special_ids), None)
    if position < min(len(before), starts[0]):
        # What comes before the answer is another once it is there: every record will be refused.
        return TurnShape(end_id=end)
    if end is not None and end in ids[begin:until]:
        raise UserError(
            f"the chat template begins an answer with {codec.decode_all([end])!r}, the token that "
            "also ends it, and has no generation prompt to tell them apart. Set "
            "data.chat_template to one that has."
        )
    after = ids[until:]
    tail = wholes[0][starts[0] + len(PROBES[0]) :]
    shown_tail = text_after(codec, ids[:until], after if end is None else after[: after.index(end)])
    is_whole = position == len(prompt) - len(header)
    shape = TurnShape(
        end_id=end, tail_ids=() if end is None else tuple(after[after.index(end) + 1 :]),
        tail_space=tail[len(tail.rstrip()) :] if end is None else "",
        shown_lead=text_after(codec, ids[:begin], ids[begin:until])[: -len(PROBES[0])],
        shown_tail=shown_tail.rstrip() if end is None else shown_tail,
        lead=wholes[0][position : starts[0]], header=header,
        unstable=max(split.missing[0] for split in splits) if is_whole else 0,
    )
    return replace(shape, notes=tuple(_notes(shape, tail)))


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _missing_header(template: ChatTemplate, prompt: str, position: int) -> str:
    """The end of the generation prompt that a finished conversation does not have."""
    if position == len(prompt):
        return ""
    try:  # a prompt that opens the thinking is how an answer with some begins
        thinking = template.render([ASK, _answer("paris") | {"reasoning_content": "hm"}]).text
        if thinking.startswith(prompt):
            return ""
    except RecordError:
        pass  # a template that cannot do with thinking: its prompt promises none
    return prompt[position:]


def _notes(shape: TurnShape, tail: str) -> list[str]:
    notes = []
    if shape.end_id is None:
        notes.append(f"the chat template ends an answer with {tail!r}, which is no token of its "
                     "own; the tokenizer's EOS is put after it")
    if shape.header:
        notes.append(f"the chat template's generation prompt ends with {shape.header!r}, which a "
                     "rendered conversation does not have; prompts are taken without it")
    if shape.lead.strip():
        notes.append(f"the chat template writes {shape.lead!r} before every answer, after its "
                     "generation prompt; it is learnt with the answer")
    if shape.unstable:
        notes.append("the last of the generation prompt is one token with the answer that follows; "
                     f"prompts are taken without it ({shape.unstable} tokens)")
    return notes
