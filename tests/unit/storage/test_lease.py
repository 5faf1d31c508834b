"""A run folder has one holder; a dead one is followed at once, a lost one writes nothing."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from megatron_irl.errors import UserError
from megatron_irl.storage import lease as module
from megatron_irl.storage.lease import Holder, Lease, LeaseLost, refuse_if_held
from megatron_irl.storage.processes import start_time, this_host


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def write_holder(folder, number, **changes):
    folder.mkdir(exist_ok=True)
    holder = dataclasses.replace(Holder.this_process(), **changes)
    (folder / f"lease.{number:06d}.json").write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


@pytest.fixture
def dead_pid():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_second_holder_is_refused_and_told_by_whom(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder = tmp_path / "run"
    lease = Lease.acquire(folder)
    begun = time.monotonic()
    with pytest.raises(UserError, match="in use by process") as raised:
        Lease.acquire(folder)
    assert time.monotonic() - begun < 1
    for word in (str(folder), str(os.getpid()), this_host().split()[0], "job 4711", "since 20"):
        assert word in str(raised.value)
    with pytest.raises(UserError, match="in use"):
        refuse_if_held(folder)
    lease.check()
    lease.release()
    assert not folder.exists()  # nothing was written there
    with pytest.raises(LeaseLost):
        lease.check()
    folder.mkdir()
    Lease.acquire(folder).release()
    assert files(folder) == []  # it was there before


def test_dead_holder_on_this_machine_is_followed_at_once(tmp_path, dead_pid):
    write_holder(tmp_path, 3, pid=dead_pid, started=12345)
    begun = time.monotonic()
    lease = Lease.acquire(tmp_path)
    assert time.monotonic() - begun < 1
    assert files(tmp_path) == ["lease.000004.json"]
    lease.release()


def test_a_process_id_used_again_is_not_the_holder(tmp_path):
    write_holder(tmp_path, 1, started=start_time(os.getpid()) - 1)
    Lease.acquire(tmp_path).release()


def test_silent_holder_on_another_host_is_followed_when_it_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)
    write_holder(tmp_path, 1, host="elsewhere boot namespace")
    begun = time.monotonic()
    lease = Lease.acquire(tmp_path)
    assert 0.9 < time.monotonic() - begun < 3
    lease.release()


def test_living_holder_on_another_host_is_believed_by_its_first_sign(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(module, "this_host", lambda: "elsewhere boot namespace")
    lease = Lease.acquire(tmp_path)
    monkeypatch.setattr(module, "this_host", lambda: "here boot namespace")
    with pytest.raises(UserError, match="in use by process .* on elsewhere"):
        Lease.acquire(tmp_path)
    lease.release()


def test_holder_that_was_followed_stops(tmp_path, monkeypatch):
    """As one that was stopped for longer than its lease lasts."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 3600.0)
    monkeypatch.setattr(module, "FRESH_SECONDS", -1.0)
    lease = Lease.acquire(tmp_path)
    lease.check()
    write_holder(tmp_path, 2, pid=1)
    with pytest.raises(LeaseLost, match=r"taken over by process 1 on .*writes nothing more"):
        lease.check()
    (tmp_path / "lease.000001.json").unlink()
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
    assert files(tmp_path) == ["lease.000002.json"]


def test_other_ranks_see_the_hold_of_the_first(tmp_path):
    lease = Lease.acquire(tmp_path)
    follower = Lease(lease.folder, lease.number, lease.token)
    follower.check()
    lease.release()
    with pytest.raises(LeaseLost):
        follower.check()


def test_a_lease_cut_by_a_power_failure_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_SECONDS", 0.5)
    (tmp_path / "lease.000007.json").write_text('{"host": "x')
    lease = Lease.acquire(tmp_path)
    assert files(tmp_path) == ["lease.000008.json"]
    lease.release()


def test_file_systems_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lease = Lease.acquire(tmp_path)
    with pytest.raises(UserError, match="in use"):
        Lease.acquire(tmp_path)
    lease.release()


def _contend(folder, barrier, answers):
    barrier.wait()
    try:
        lease = Lease.acquire(folder)
    except UserError as error:
        answers.put(str(error))
    else:
        answers.put("mine")
        time.sleep(0.5)
        lease.check()
        lease.release()


@pytest.mark.parametrize("left_behind", [False, True])
def test_one_of_many_that_start_together_gets_it(tmp_path, dead_pid, left_behind):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if left_behind:
            write_holder(folder, 1, pid=dead_pid, started=12345)
        barrier, answers = context.Barrier(6), context.Queue()
        racers = [context.Process(target=_contend, args=(folder, barrier, answers))
                  for _ in range(6)]
        for racer in racers:
            racer.start()
        found = [answers.get(timeout=30) for _ in racers]
        for racer in racers:
            racer.join()
        assert found.count("mine") == 1, found
        assert all("in use by process" in text for text in found if text != "mine")
        assert not folder.exists() or files(folder) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Lease.acquire(tmp_path / "file" / "run")
