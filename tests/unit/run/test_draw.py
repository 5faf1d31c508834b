"""What a step draws: passes over the data go on from round to round, a round's samples do not."""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from megatron_irl.algorithms.base import Work
from megatron_irl.run.loop import few_items_warning
from megatron_irl.train.step import Trainer, streams_of
from megatron_irl.types import Demonstration


def demonstrations(count):
    ids = np.array([1, 2], np.int32)
    return [Demonstration(i, ids, ids, "", "", None, "") for i in range(count)]


def drawn(work, rounds, steps, batch):
    """Ordinals by round, of the first stream's batches and then the second's in every step."""
    options = SimpleNamespace(
        global_batch_size=batch, micro_batch_size=batch, micro_batch_tokens=None
    )
    trainer = SimpleNamespace(recipe=SimpleNamespace(train=options))
    found = []
    for round in range(rounds):
        ordinals = []
        for step in range(2, 2 + steps):
            streams = streams_of(
                ((work.items, work.outlasts_round), (work.second, True)), seed=5, round=round,
                step=step, first=2, last=2 + steps,
            )
            ordinals += [item.ordinal for stream in streams
                         for item in Trainer.drawn(trainer, stream)]
        found.append(ordinals)
    return found


def test_rounds_of_sft_are_slices_of_passes():
    """4 rounds of 2 steps of 3 draw 24 of 12: every demonstration exactly twice."""
    work = Work(demonstrations(12), None, outlasts_round=True)
    rounds = drawn(work, rounds=4, steps=2, batch=3)
    assert set(Counter(sum(rounds, [])).values()) == {2}
    assert set(Counter(rounds[0] + rounds[1]).values()) == {1}
    assert rounds[0] + rounds[1] != rounds[2] + rounds[3]  # another order in the second pass


def test_a_round_s_own_items_are_drawn_from_the_beginning():
    rounds = drawn(Work(demonstrations(6), None), rounds=3, steps=2, batch=3)
    assert all(sorted(ordinals) == list(range(6)) for ordinals in rounds)


def test_the_second_stream_outlasts_rounds():
    first, second = demonstrations(6), demonstrations(12)
    rounds = drawn(Work(first, None, second=second), rounds=2, steps=2, batch=3)
    seconds = [o for ordinals in rounds for step in (0, 1) for o in ordinals[6 * step + 3 :][:3]]
    assert sorted(seconds) == list(range(12))


def test_few_usable_items_are_said_with_how_often_each_is_drawn():
    assert few_items_warning(Work(demonstrations(4), None, num_unusable=4), 64) is None
    text = few_items_warning(Work(demonstrations(4), None, num_unusable=60), 64)
    assert "60 of 64 samples" in text and "16.0 times each" in text
    assert "skipped" in few_items_warning(Work([], None, num_unusable=64), 64)
