"""The other stages' weights are taken whole or not at all."""

from types import SimpleNamespace
from typing import Any

import pytest

import megatron_irl.hardware  # noqa: F401
from megatron_irl.policy import pipeline_sampling
from megatron_irl.policy.pipeline_sampling import PolicyGenerator


class Whole:
    """Weights of which some are there before memory ends."""

    topology, nbytes = None, 7

    def __init__(self, failure: Exception | None) -> None:
        self.failure, self.freed = failure, 0

    def allocate(self) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        return []

    def free(self) -> None:
        self.freed += 1


@pytest.mark.parametrize("here", [True, False], ids=["fails here", "fails elsewhere"])
@pytest.mark.parametrize("held", [True, False])
def test_what_was_taken_is_given_back(monkeypatch, here, held):
    monkeypatch.setattr(pipeline_sampling, "agree", lambda numbers, _: [True])
    stages = SimpleNamespace(close=lambda: None)
    generator: Any = SimpleNamespace(
        _holds=held, _stages=stages, _active=object(), _topology=None, _options={},
        residency=SimpleNamespace(weight_bytes=0),
    )
    whole = Whole(RuntimeError("not enough memory\nsecond line") if here else None)
    reason = PolicyGenerator._take(generator, whole)  # type: ignore[arg-type]
    said = "not enough memory" if here and not held else "on another rank"
    assert reason == f"their weights could not be allocated ({said})"
    assert whole.freed == (not held), "what stays from an earlier phase is freed by the caller"
    assert generator.residency.weight_bytes == 0
