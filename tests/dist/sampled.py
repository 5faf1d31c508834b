"""What tests of samples on ranks compare: responses of one process and of several.

Layouts sum in different orders, so in fp32 a logit may differ by about 1e-6; a sampled token
changes where the uniform number falls that close to a step of the cumulative distribution. Of the
responses that are compared one may therefore differ.
"""

from collections.abc import Sequence

import numpy as np

from tests.dist.layouts import SEED

BUDGET = 10
PROMPT_LENGTHS = (5, 1, 17, 9, 30, 2, 8, 3, 4)  # not a multiple of the replicas
Response = tuple[list[int], list[float], str]
"""Ids, log-probabilities, and why it ended."""


def assert_same(got: Sequence[Response], want: Sequence[Response]) -> None:
    """The same responses, but for one that may be rounding's."""
    same = [(a, b) for a, b in zip(got, want, strict=True) if a[0] == b[0]]
    assert len(same) >= len(want) - 1, f"seed {SEED}"
    for (_, logprobs, reason), (_, expected_logprobs, expected_reason) in same:
        assert reason == expected_reason
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
