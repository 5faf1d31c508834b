"""Every part that a rank reads of a round is a sign of progress: all of them can take minutes."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_irl.console import Console
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.evaluation.heldout import Evaluator
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.heartbeat import Heartbeat
from megatron_irl.policy.pairs import sample_pairs
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.types import Demonstration
from tests.unit.data.pairs import assert_same, make_pairs


class Heart(Heartbeat):
    """Counts the signs."""

    signs = 0

    def beat(self) -> None:
        self.signs += 1


@pytest.fixture
def topology() -> Any:
    return SimpleNamespace(
        rank=0, world_size=1, dp_rank=0, dp_size=1, is_main=True, heart=Heart())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, topology: Any) -> list[int]:
    """How many signs there were when each part was read."""
    signs: list[int] = []
    original = PairBank._read_pairs

    def counted(*arguments: Any) -> Any:
        signs.append(topology.heart.signs)
        return original(*arguments)

    monkeypatch.setattr(PairBank, "_read_pairs", counted)
    return signs


def test_parts_that_an_earlier_start_sampled(tmp_path, topology, read):
    pairs = make_pairs(10)
    bank = SharedBank(tmp_path, 7, topology)
    bank.begin_round(0, [(i, i + 2) for i in range(0, 10, 2)])
    for part in range(5):
        bank.write_part(0, part, pairs[2 * part : 2 * part + 2])
    demonstrations = [Demonstration(0, p.prompt_ids, p.demo_ids, "", "", None, "") for p in pairs]

    class Reached(Exception):
        """All parts were read, and the clock was asked."""

    def timed(phase: str) -> Any:
        raise Reached

    policy: Any = SimpleNamespace(topology=topology, sampling_ranks=lambda: topology,
                                  generator=SimpleNamespace(take_note=lambda: None))
    clock: Any = SimpleNamespace(timed=timed)
    with pytest.raises(Reached):
        sample_pairs(policy, bank, 0, demonstrations, sampling=SamplingConfig(), part_size=2,
                     console=Console(enabled=False), clock=clock)
    assert read == [1, 2, 3, 4, 5]


def test_held_out_pairs(tmp_path, topology, read):
    pairs = make_pairs(6)
    bank = SharedBank(tmp_path, 7, topology)
    bank.begin_round(0, [(0, 3), (3, 6)])
    for part in range(2):
        bank.write_part(0, part, pairs[3 * part : 3 * part + 3])
    bank.finish_round(0)
    evaluator = Evaluator.__new__(Evaluator)  # nothing else of it is asked
    evaluator.bank, evaluator._opened = bank, None
    evaluator.policy = SimpleNamespace(topology=topology)  # type: ignore[assignment]
    assert_same(evaluator._read(0), pairs)
    assert read == [1, 2]
