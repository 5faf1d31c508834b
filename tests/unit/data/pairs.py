"""Pairs of random numbers, and their comparison."""

import numpy as np

from megatron_irl.types import Pair


def make_pair(rng, ordinal=0, round=0, references=False):
    def draw():
        return rng.integers(0, 100, size=rng.integers(1, 9)).astype(np.int32)

    sample = draw()
    refs = [float(x) for x in rng.normal(size=2).astype(np.float32)]
    return Pair(
        ordinal=ordinal, prompt_ids=draw(), demo_ids=draw(), sample_ids=sample,
        sample_logprobs=-rng.random(len(sample)).astype(np.float32),
        finish_reason=["stop", "length"][ordinal % 2], round=round,
        ref_demo_logp=refs[0] if references else None,
        ref_sample_logp=refs[1] if references else None)


def make_pairs(num, seed=0, round=0, references=False):
    rng = np.random.default_rng(seed)
    return [make_pair(rng, i, round, references) for i in range(num)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        for name, value in vars(e).items():
            if isinstance(value, np.ndarray):
                assert getattr(a, name).dtype == value.dtype
                assert getattr(a, name).tolist() == value.tolist()
            else:
                assert getattr(a, name) == value and type(getattr(a, name)) is type(value)
