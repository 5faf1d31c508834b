"""The logs survive kills, a full disk and resumption."""

import json
import math
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from megatron_irl.errors import UserError
from megatron_irl.run.runlog import RunLog
from megatron_irl.storage.commit import write_file


def step_line(step, round_index=0, **values):
    return {"step": step, "round": round_index, **values}


def test_lines_are_read_back_as_written(tmp_path):
    log = RunLog(tmp_path / "run")
    lines = [step_line(1, loss=math.log(2)), step_line(2, text="π\u2028 \ud800", nested={"a": [1]})]
    for line in lines:
        log.log_metrics(line)
    log.log_round({"round": 0, "step": 2, "guard": []})
    assert log.read_metrics() == lines
    assert log.read_rounds() == [{"round": 0, "step": 2, "guard": []}]
    assert (tmp_path / "run/metrics.jsonl").read_bytes().count(b"\n") == 2


def test_a_run_without_logs_has_no_lines(tmp_path):
    log = RunLog(tmp_path)
    log.level(10, 1)
    assert log.read_metrics() == log.read_rounds() == []
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics(step_line(np.int64(1), a=float("nan"), b=[float("inf"), np.float32(0.5)],
                              c={"d": -math.inf}))
    text = log.metrics_path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "round": 0, "a": None, "b": [None, 0.5], "c": {"d": None}}


def test_level_keeps_what_the_checkpoint_contains(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 7):
        log.log_metrics(step_line(step, (step - 1) // 2))
    for index in range(3):
        log.log_round({"round": index, "step": 2 * (index + 1)})
    log.level(3, 1)  # the checkpoint is one step into round 1
    assert [line["step"] for line in log.read_metrics()] == [1, 2, 3]
    assert [line["round"] for line in log.read_rounds()] == [0]
    log.level(3, 1)
    assert [line["step"] for line in log.read_metrics()] == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "rounds.jsonl"]


@pytest.mark.parametrize("length", [1, 25, 5000])
def test_a_torn_last_line_is_skipped_then_replaced(tmp_path, length):
    log = RunLog(tmp_path)
    log.log_metrics(step_line(1))
    with log.metrics_path.open("ab") as stream:
        stream.write((b'{"step": 2, "x": "' + b"y" * 5000)[:length])
    assert log.read_metrics() == [step_line(1)]
    log.log_metrics(step_line(2))
    assert log.read_metrics() == [step_line(1), step_line(2)]


def test_a_file_that_is_one_torn_line_is_started_again(tmp_path):
    log = RunLog(tmp_path)
    log.metrics_path.write_bytes(b'{"st')
    log.level(0, 0)
    assert log.metrics_path.read_bytes() == b""
    log.log_metrics(step_line(1))
    assert log.read_metrics() == [step_line(1)]


def test_damage_inside_the_file_is_named_by_line(tmp_path):
    log = RunLog(tmp_path)
    log.metrics_path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not JSON"):
        log.read_metrics()


@contextmanager
def file_size_limit(size):
    """Make writes past a size fail after a partial write, as a full disk does.

    Only around the write under test: the limit holds for the test runner's own output as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_cut_short_leaves_no_torn_line(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics(step_line(1))
    before = log.metrics_path.read_bytes()
    expected = pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large")
    with expected, file_size_limit(len(before) + 10):
        log.log_metrics(step_line(2, loss=0.5))
    assert log.metrics_path.read_bytes() == before


def test_an_atomic_write_cut_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.html"
    write_file(path, b"old")
    expected = pytest.raises(UserError, match=r"cannot write .*page\.html")
    with expected, file_size_limit(100):
        write_file(path, b"new" * 100)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path):
    log = RunLog(tmp_path)
    log.metrics_path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl.*Free some space"):
        log.log_metrics(step_line(1))


# --- brought level with a checkpoint


def logged(root, steps=6):
    """A log of two steps a round, and what a checkpoint after the last step keeps of it."""
    log = RunLog(root)
    for step in range(1, steps + 1):
        log.log_metrics(step_line(step, (step - 1) // 2))
        if step % 2 == 0:
            log.log_round({"round": step // 2 - 1, "step": step})
    return log, log.recent()


def cut_last_line(path):
    path.write_bytes(path.read_bytes()[:-9])


def overwrite_last_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + b"\0" * (len(lines[-1]) - 1) + b"\n")


def damage_a_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{" + lines[1], *lines[2:]]))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("hurt", [cut_last_line, overwrite_last_line, damage_a_line, remove])
def test_lines_that_the_log_has_lost_come_back_from_the_checkpoint(tmp_path, hurt):
    log, kept = logged(tmp_path)
    before = log.metrics_path.read_bytes(), log.rounds_path.read_bytes()
    hurt(log.metrics_path)
    hurt(log.rounds_path)
    again = RunLog(tmp_path)
    assert again.level(6, 3, kept) == []
    assert (log.metrics_path.read_bytes(), log.rounds_path.read_bytes()) == before
    assert again.recent() == kept


@pytest.mark.parametrize("hurt", [cut_last_line, overwrite_last_line])
def test_a_damaged_last_line_is_no_reason_to_die(tmp_path, hurt):
    log, _ = logged(tmp_path)
    hurt(log.metrics_path)
    assert [line["step"] for line in log.read_metrics()] == [1, 2, 3, 4, 5]


def test_lines_lost_for_good_are_said(tmp_path):
    log, _ = logged(tmp_path)
    log.metrics_path.write_bytes(b"")
    said = RunLog(tmp_path).level(6, 3, None)
    assert said == ["metrics.jsonl has lost step 1, step 2, step 3 and 3 more for good; nothing "
                    "else depends on it"]


def test_nothing_is_logged_past_the_fence(tmp_path):
    def lost():
        raise UserError("another run's")

    log, _ = logged(tmp_path)
    before = log.metrics_path.read_bytes(), log.rounds_path.read_bytes()
    fenced = RunLog(tmp_path, fence=lost)
    for write in (lambda: fenced.log_metrics(step_line(7)), lambda: fenced.level(2, 1),
                  lambda: fenced.log_round({"round": 3, "step": 8})):
        with pytest.raises(UserError, match="another run's"):
            write()
    assert (log.metrics_path.read_bytes(), log.rounds_path.read_bytes()) == before


def test_a_folder_in_the_place_of_a_log_is_named(tmp_path):
    log = RunLog(tmp_path)
    log.metrics_path.mkdir()
    for act in (lambda: log.level(3, 0), log.read_metrics,
                lambda: log.log_metrics({"step": 1, "round": 0})):
        with pytest.raises(UserError, match="metrics.jsonl.*directory"):
            act()
