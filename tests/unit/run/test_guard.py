"""Hand-worked rounds for every warning, and near misses that must stay silent."""

import pytest

from megatron_irl.run.guard import CollapseGuard


def fed(steps):
    guard = CollapseGuard()
    for step in steps:
        guard.feed(step)
    return guard


def ramp(first, last, steps=10):
    return [first + (last - first) * i / (steps - 1) for i in range(steps)]


def series(**values):
    return [dict(zip((k.replace("__", "/") for k in values), row, strict=True))
            for row in zip(*values.values(), strict=True)]


def test_forgetting_is_said_with_numbers():
    """Fifths of 10 steps are 2: logp (-50, -51) -> (-58, -59) is -50.5 -> -58.5, a fall of 8.

    The standard error is sqrt(0.5/2 + 0.5/2) = 0.71, two of them 1.41; 2% of 50.5 is 1.01.
    Margins (0, 0.2) -> (1.6, 1.8) have the means 0.1 and 1.7.
    """
    guard = fed(series(logp__demo=ramp(-50, -59), reward__margin=ramp(0, 1.8)))
    (text,) = guard.check()
    assert "fell from -50.5 to -58.5 nats" in text
    assert "grew from 0.1 to 1.7" in text
    assert "algorithm.nll_coefficient" in text and "optimizer.lr" in text


@pytest.mark.parametrize(("logp", "margin"), [
    (ramp(-59, -50), ramp(0, 1.8)),         # demonstrations get likelier
    (ramp(-50, -59), ramp(1.8, 0)),         # the margin does not grow
    (ramp(-50, -50.9), ramp(0, 1.8)),       # 0.8 nats between the fifths: below 1 nat
    (ramp(-500, -509), ramp(0, 1.8)),       # 8 nats are below 2% of 500.5 = 10.01
    (ramp(-50, -59, 9), ramp(0, 1.8, 9)),   # 9 steps are no trend
])
def test_no_forgetting(logp, margin):
    assert fed(series(logp__demo=logp, reward__margin=margin)).check() == []


def test_a_fall_within_the_noise_is_none():
    """First fifth (-40, -60), last (-50, -58): means -50 -> -54, a fall of 4.

    The standard error is sqrt(200/2 + 32/2) = 10.8, and 4 < 2 * 10.8.
    """
    logp = [-40, -60, *[-50] * 6, -50, -58]
    assert fed(series(logp__demo=logp, reward__margin=ramp(0, 1))).check() == []


def test_harder_batches_are_not_forgetting():
    steps = series(logp__demo=ramp(-50, -59), reward__margin=ramp(0, 1.8))
    for step, reward in zip(steps, ramp(0, 0.4), strict=True):
        step["reward/demo"] = reward  # against the reference the demonstrations gained
    assert fed(steps).check() == []
    # An explicit reward rises because its head learns, whatever becomes of the likelihood.
    explicit = CollapseGuard(has_implicit_reward=False)
    for step in steps:
        explicit.feed(step)
    assert "are being forgotten" in explicit.check()[0]


def test_saturation_looks_at_the_last_quarter():
    """12 steps: the last 3 have accuracy (1 + 0.99 + 0.99) / 3 = 0.9933."""
    (text,) = fed(series(reward__accuracy=[0.5] * 9 + [1.0, 0.99, 0.99])).check()
    assert "reward/accuracy was 0.9933 over the last 3 of 12 steps" in text
    assert "steps_per_round" in text
    assert fed(series(reward__accuracy=[1.0] * 9 + [1.0, 0.98, 0.98])).check() == []


def test_lengths():
    """Demonstrations 40 tokens: samples of 9 are below a quarter, 10 are not."""
    short = fed(series(length__demo=[30, 50], length__sample=[10, 8]))
    (text,) = short.check()
    assert "9.0 tokens long on average, demonstrations 40.0 (ratio 0.23" in text
    assert fed(series(length__demo=[30, 50], length__sample=[10, 10])).check() == []
    assert short.check({"mean_length": 35.0}) == []  # counts over all of the round's samples win


def test_truncation():
    (text,) = fed([]).check({"samples": 80, "truncated": 41})
    assert "41 of 80 samples" in text and "generation.max_new_tokens" in text
    assert fed([]).check({"samples": 80, "truncated": 40}) == []


def test_warnings_while_the_round_runs_come_once_and_again_next_round():
    guard, said = CollapseGuard(), {}
    for _ in range(2):
        for step in range(1, 41):
            guard.feed({"reward/accuracy": 1.0})
            said.setdefault(step, []).extend(guard.step_warnings())
        guard.start_round()
    assert [step for step, texts in said.items() if texts] == [20]
    assert len(said[20]) == 2
    assert guard.check() == []


def test_absent_and_null_metrics_are_fine():
    steps = [{"step": i, "loss": 1.0, "logp/demo": None, "reward/margin": float("nan")}
             for i in range(30)]
    assert fed(steps).check({}) == []


def test_looping_samples_are_said_unless_demonstrations_loop_too():
    guard = CollapseGuard()
    (warning,) = guard.check({"repetition": 0.6, "demo_repetition": 0.01})
    assert "60%" in warning and "algorithm.beta" in warning
    assert not guard.check({"repetition": 0.6, "demo_repetition": 0.35})
    assert not guard.check({"repetition": 0.2, "demo_repetition": 0.0})
