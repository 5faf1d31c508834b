"""The digest changes with every token, with order, and with where a prompt ends."""

import numpy as np

from megatron_irl.data.digest import digest_of


def sequence(prompt, response):
    return np.array(prompt, np.int32), np.array(response, np.int32)


def test_equal_content_has_equal_digests():
    wide = (np.array([1, 2], np.int64), np.array([3], np.int64))
    assert digest_of([sequence([1, 2], [3])]) == digest_of([wide])


def test_any_change_changes_it():
    base = [sequence([1, 2], [3]), sequence([4], [5, 6])]
    others = [
        base[::-1], base[:1], [*base, base[0]], [sequence([1], [2, 3]), base[1]],
        [sequence([1, 2], [4]), base[1]],
    ]
    digests = {digest_of(sequences) for sequences in [base, *others]}
    assert len(digests) == len(others) + 1
