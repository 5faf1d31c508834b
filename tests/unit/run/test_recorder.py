"""What a recorder remembers of a round whose beginning another process recorded."""

from types import SimpleNamespace
from typing import Any

from megatron_irl.run.recorder import Recorder


def recorder(path, said: list[str]) -> Any:
    train = SimpleNamespace(spike_factor=6.0, on_spike="warn", on_collapse="warn")
    made: Any = Recorder(
        SimpleNamespace(path=path), SimpleNamespace(train=train),  # type: ignore[arg-type]
        SimpleNamespace(reward="implicit", phases=lambda _: [0]),  # type: ignore[arg-type]
        SimpleNamespace(warn=said.append), SimpleNamespace(), SimpleNamespace(),  # type: ignore
        is_main=False,
    )
    made.is_main = True
    return made


def line(step: int) -> dict[str, Any]:
    """Of a round that forgets its demonstrations, with a spike at step 15."""
    return {"step": step, "loss": 9.0 if step == 15 else 0.7 - 0.001 * step,
            "logp/demo": -50.0 - step, "reward/margin": 0.2 * step, "reward/demo": -0.1 * step}


def test_a_resumed_round_says_nothing_twice_and_forgets_nothing(tmp_path):
    said: list[str] = []
    whole = recorder(tmp_path, said)
    for step in range(1, 41):
        whole.guard.feed(line(step))
        whole._watch(line(step), "")
    spikes = [text for text in said if "the loss is 9" in text]
    assert len(said) == 2 and len(spikes) == 1 and "(step 15; train.on_spike=warn)" in spikes[0]

    again: list[str] = []
    resumed = recorder(tmp_path, again)
    for step in range(1, 31):
        resumed._replay(line(step))
    for step in range(31, 41):
        resumed.guard.feed(line(step))
        resumed._watch(line(step), "")
    assert again == [], "both were said before the kill"
    assert resumed._warned == whole._warned == spikes
