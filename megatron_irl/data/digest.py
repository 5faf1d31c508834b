"""A name for the content of data, to notice that it is no longer what a run began with."""

import hashlib
from collections.abc import Iterable

import numpy as np


def digest_of(
    sequences: Iterable[tuple[np.ndarray, np.ndarray]], masks: Iterable[np.ndarray | None] = ()
) -> str:
    """Sixteen hex digits of the token ids of (prompt, response) sequences and their order.

    Args:
        sequences: int32 ids.
        masks: Which tokens of responses are learnt; those that are None change nothing.
    """
    digest = hashlib.blake2b(digest_size=8)
    for prompt, response in sequences:
        # The lengths too: the same ids cut elsewhere are other data.
        digest.update(np.array([len(prompt), len(response)], np.int64).tobytes())
        for ids in (prompt, response):
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    for index, mask in enumerate(masks):
        if mask is not None:
            digest.update(np.int64(index).tobytes() + np.packbits(mask).tobytes())
    return digest.hexdigest()
