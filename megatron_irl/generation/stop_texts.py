"""Texts that end a response: seen while it is sampled, and cut off afterwards."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_irl.types import Sample

# Ids decoded before those that could hold the text: enough for the space in between, and for ids
# with no text of their own.
CONTEXT = 16

Decode = Callable[[np.ndarray], str]
"""Ids of a response, from its first on, to its text."""


class StopTexts:
    """Where responses end by their text.

    Args:
        texts: None empty.
        decode_part: Text of any stretch of ids, special tokens left out.
    """

    def __init__(self, texts: Sequence[str], decode_part: Callable[[np.ndarray], str]) -> None:
        self._texts, self._decode_part = list(texts), decode_part
        # A token is a byte of text or more.
        self._reach = max(len(text.encode()) for text in texts) + CONTEXT
        self._seen: dict[int, int] = {}

    def ends(self, request: int, token_ids: np.ndarray, decode: Decode) -> bool:
        """Whether the text of a response has one of the texts by now.

        Only what is new is looked at, with as much before it as a text may reach back; a response
        of any length costs little a token.

        Args:
            request: Which response; asked about with ever more ids.
            token_ids: All of its ids so far.
        """
        start = max(0, self._seen.get(request, 0) - self._reach)
        self._seen[request] = len(token_ids)
        if not self._in(self._decode_part(token_ids[start:])):
            return False
        return self._in(decode(token_ids))

    def cut(self, sample: Sample, decode: Decode) -> tuple[str, Sample]:
        """The text before the first of the texts, and the tokens up to its last."""
        text = decode(sample.token_ids)
        if not self._in(text):
            return text, sample
        # The fewest tokens whose text has one of the texts: having one, more tokens keep it.
        fewest, most = 1, len(sample.token_ids)
        while fewest < most:
            middle = (fewest + most) // 2
            if self._in(decode(sample.token_ids[:middle])):
                most = middle
            else:
                fewest = middle + 1
        text = decode(sample.token_ids[:most])
        end = min(text.index(each) for each in self._texts if each in text)
        return text[:end], Sample(sample.token_ids[:most], sample.logprobs[:most], "stop")

    def _in(self, text: str) -> bool:
        return any(each in text for each in self._texts)
