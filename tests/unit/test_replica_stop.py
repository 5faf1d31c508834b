"""What replicas that generate by themselves hear of a request to stop, and how often."""

from types import SimpleNamespace

import pytest

from megatron_irl.parallel import agreement
from megatron_irl.parallel.agreement import ReplicaStop
from megatron_irl.parallel.stop_request import FINISH_PART, LEAVE_PART, StopRequest


class Store(dict[str, str]):
    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that the test sets, and one store for all replicas."""
    found = SimpleNamespace(now=0.0, store=Store())
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(
        agreement.dist.distributed_c10d, "_get_default_store", lambda: found.store
    )
    return found


def replica(**sizes: int) -> ReplicaStop:
    place = {"dp_size": 2, "tp_size": 1, "pp_size": 1, "tp_rank": 0, "pp_rank": 0} | sizes
    topology = SimpleNamespace(**place, stop=StopRequest(), groups=SimpleNamespace(mp=None))
    return ReplicaStop(topology)  # type: ignore[arg-type]


def test_one_request_stays_one_however_long_the_part_takes(clock: SimpleNamespace) -> None:
    asked, other = replica(), replica()
    asked.topology.stop.ask("SIGTERM was received")
    for clock.now in (0.0, 1.5, 3.0, 30.0):
        assert asked.level() == FINISH_PART
        assert other.level() == (FINISH_PART if clock.now else 0)


def test_a_second_request_still_leaves_the_part(clock: SimpleNamespace) -> None:
    asked = replica()
    asked.topology.stop.ask("SIGTERM was received")
    assert asked.level() == FINISH_PART
    asked.topology.stop.ask("SIGTERM was received")
    assert asked.level() == LEAVE_PART


def test_a_request_to_any_rank_of_a_replica_reaches_the_others(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = replica(tp_size=2), replica()
    # The second tensor rank of the first replica alone was asked.
    monkeypatch.setattr(agreement, "_largest", lambda numbers, group: [max(*numbers, FINISH_PART)])
    assert first.level() == FINISH_PART
    clock.now = 1.5
    assert other.level() == FINISH_PART
