"""Conversations written as one text, with the speakers' names before their turns."""

import re

from megatron_irl.data.conversation import Messages

# "\n\nHuman: ...\n\nAssistant: ..." of the HH set, "### Human: ...### Assistant: ..." of Guanaco.
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?|(?:^|\n)?### (Human|Assistant): ?")


def has_turns(text: str) -> bool:
    """Whether a text is such a conversation: someone speaks, and is answered."""
    return text.lstrip("\n").startswith(("Human: ", "### Human:")) and "Assistant:" in text


def turns_of(text: str) -> Messages:
    """The turns of a conversation written as one text; two of one speaker in a row are joined."""
    text = text.lstrip("\n")
    marks = list(_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    messages: Messages = []
    for mark, end in zip(marks, ends, strict=True):
        role = "user" if "Human" in (mark[1], mark[2]) else "assistant"
        content = text[mark.end() : end].strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages
