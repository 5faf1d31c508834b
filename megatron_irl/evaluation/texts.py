"""Texts as token ids, the way lm-eval's own adapter of transformers makes them.

Numbers are comparable with published ones only if every seam between context and continuation falls
where it fell there, so the rules (and their corner cases) are lm-eval's; the codec is ours.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import with_bos
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.policy.scoring import Sequences


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token that a text without context is conditioned on: BOS, or else EOS."""
    for token in (tokenizer.bos_id, tokenizer.codec.eos_id):
        if token is not None:
            return token
    return tokenizer.eos_id


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, bos: bool = True
) -> list[list[int]]:
    """Ids of each text, with one BOS in front where the tokenizer adds one and ``bos`` is asked.

    Raises:
        UserError: The tokenizer fails on a text, or the model has no embedding for a token.
    """
    try:
        encoded = tokenizer.encode_batch(list(texts))
        if bos:
            encoded = [with_bos(tokenizer, ids) for ids in encoded]
        for ids in encoded:
            tokenizer.check_ids(ids)
    except RecordError as error:
        raise UserError(f"a text of the evaluation: {error}.") from error
    return encoded


def continuations(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], max_length: int
) -> Sequences:
    """(context, continuation) texts as (prompt ids, response ids).

    Spaces at a context's end go to the continuation. Too long a context loses its beginning: the
    model reads ``max_length`` tokens and predicts one more.

    Raises:
        UserError: A continuation alone is longer than that.
    """
    moved = []
    for context, continuation in pairs:
        bare = context.rstrip()
        moved.append((bare, context[len(bare) :] + continuation))
    wholes = encode_texts(tokenizer, [a + b for a, b in moved])
    heads = encode_texts(tokenizer, [a for a, _ in moved])
    alone = iter(encode_texts(tokenizer, [b for a, b in moved if not a], bos=False))
    sequences = []
    for (context, _), whole, head in zip(moved, wholes, heads, strict=True):
        if context:
            ids = head, whole[len(head) :]
        else:
            rest, first = next(alone), prefix_id(tokenizer)
            ids = (rest[:1], rest[1:]) if rest[:1] == [first] else ([first], rest)
        sequences.append(_within(*ids, max_length))
    return sequences


def _within(
    prompt: list[int], response: list[int], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    if len(response) > max_length:
        raise UserError(f"a continuation of the evaluation has {len(response)} tokens, the model "
                        f"{max_length} positions. Leave its task out.")
    prompt = prompt[-(max_length + 1 - len(response)) :]
    return np.array(prompt, np.int32), np.array(response, np.int32)


def rolling_windows(ids: list[int], first: int, max_length: int) -> Iterator[tuple[list[int], ...]]:
    """Windows (context, predicted) in which each token of a text is predicted exactly once.

    The first predicts up to ``max_length`` tokens after ``first``, the others as many each, after
    one token of context; the last reaches back as far as the model reads.
    """
    done = min(max_length, len(ids))
    if done:
        yield [first], ids[:done]
    while done < len(ids):
        count = min(len(ids) - done, max_length)
        end = done + count
        yield ids[end - max_length - 1 : done], ids[done:end]
        done = end


def rolling(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int
) -> tuple[Sequences, list[int]]:
    """The windows of every text, and for each window the position of its text."""
    sequences: Sequences = []
    owners = []
    for place, ids in enumerate(encode_texts(tokenizer, texts)):
        for context, predicted in rolling_windows(ids, prefix_id(tokenizer), max_length):
            sequences.append((np.array(context, np.int32), np.array(predicted, np.int32)))
            owners.append(place)
    return sequences, owners


def render_chat(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The text of a conversation; without a generation prompt it ends where its last turn's does.

    Raises:
        UserError: No chat template, or it refuses the messages.
    """
    template = tokenizer.require_chat_template()
    try:
        text = template.render(messages, add_generation_prompt=add_generation_prompt).text
    except RecordError as error:
        raise UserError(f"--apply-chat-template: {error}.") from error
    if add_generation_prompt:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)] if last and last in text else text
