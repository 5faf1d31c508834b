"""The ranks of a machine without a process group: one reads, the others get its ids or its error.

The waiting rank is a process forked of this one, as real as one of a launcher.
"""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from megatron_irl.data.corpus import Corpus
from megatron_irl.data.demonstrations import LoadReport
from megatron_irl.data.token_store import TokenStore
from megatron_irl.errors import UserError, is_told_elsewhere
from megatron_irl.parallel.main_rank import AnotherRankFailed
from megatron_irl.run import tokens as module
from megatron_irl.run.tokens import Tokens
from megatron_irl.storage.processes import start_time
from megatron_irl.types import Demonstration

KEY, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
FORK = multiprocessing.get_context("fork")


def read(gather, ids=(1, 2)):
    """A corpus of one demonstration."""
    def fill(keep):
        ours = np.array(ids, np.int32), np.array([3], np.int32)
        keep(Demonstration(0, *ours, "p", "r", None, "s"))
        return LoadReport(kept=1)

    if gather is None:
        kept = []
        return Corpus(kept, digest="alone", report=fill(kept.append))
    rows, report = gather("train", fill)
    return Corpus(rows, digest="shared", report=report)


def never(*_):
    raise AssertionError("this rank must not read")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    return tmp_path / "run" / "tokens"


class Waiting:
    """A rank that does not read, in a process of its own."""

    def __init__(self, folder, reads=never, patience=30.0, calls=1):
        self._queue = FORK.Queue()
        self._process = FORK.Process(target=self._work, args=(folder, reads, patience, calls))
        self._process.start()

    def _work(self, folder, reads, patience, calls):
        os.environ["LOCAL_RANK"] = "1"
        module.PATIENCE_SECONDS = patience
        for _ in range(calls):
            try:
                found = Tokens(TokenStore(folder)).corpus(never, reads)
                said = (found.digest, [d.prompt_ids.tolist() for d in found.demonstrations])
            except BaseException as error:
                elsewhere = isinstance(error, UserError) and is_told_elsewhere(error)
                said = (type(error).__name__, str(error), elsewhere)
            self._queue.put(said)

    def answer(self):
        return self._queue.get(timeout=60)


def make(folder, reads=read, key=KEY):
    tokens = Tokens(TokenStore(folder))
    return tokens, tokens.corpus(lambda: key, reads)


def test_one_reads_and_the_other_maps(folder):
    waiting = Waiting(folder)
    time.sleep(0.3)  # it waits first
    tokens, found = make(folder)
    assert tokens.is_new and found.digest == "shared"
    assert waiting.answer() == ("shared", [[1, 2]])


def test_a_second_start_reads_nothing(folder):
    make(folder)
    waiting = Waiting(folder)
    tokens, found = make(folder, never)
    assert not tokens.is_new and found.digest == "shared"
    assert waiting.answer() == ("shared", [[1, 2]])


@pytest.mark.parametrize(("error", "named"), [
    (UserError("train.jsonl:3: bad"), ("UserError", "train.jsonl:3: bad", True)),
    (RuntimeError("odd"), ("AnotherRankFailed", "the rank that reads this machine's data failed: "
                           "RuntimeError('odd')", False)),
])
def test_errors_reach_the_ranks_that_wait(folder, error, named):
    def fails(gather):
        raise error

    waiting, start = Waiting(folder), time.monotonic()
    with pytest.raises(type(error)):
        make(folder, fails)
    assert waiting.answer() == named
    assert time.monotonic() - start < 20
    assert issubclass(AnotherRankFailed, RuntimeError)


def test_an_error_before_the_first_file_is_read_is_told_too(folder):
    def fails():
        raise UserError("no such file")

    waiting = Waiting(folder)
    with pytest.raises(UserError):
        Tokens(TokenStore(folder)).corpus(fails, never)
    assert waiting.answer() == ("UserError", "no such file", True)


@pytest.mark.parametrize("what", [{"key": KEY}, {"error": "old", "is_user": True}, {}])
def test_words_of_a_process_that_has_ended_are_not_believed(folder, what):
    """Of an earlier start, whose data may have been others; or of a maker that was killed."""
    def speak():
        module._Word(folder).say(**what)

    make(folder, key=OTHER)
    module._calls.clear()
    dead = FORK.Process(target=speak)
    dead.start()
    dead.join()
    assert Waiting(folder, read, patience=0.5).answer() == ("alone", [[1, 2]])


def test_a_maker_that_is_killed_at_work_keeps_nobody(folder):
    maker = FORK.Process(target=lambda: make(folder, lambda gather: time.sleep(60)))
    maker.start()
    waiting = Waiting(folder, read, patience=5.0)
    word = module._Word(folder)._path
    while not word.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # longer than the waiting rank's patience with nobody
    maker.kill()
    maker.join()
    assert waiting.answer() == ("alone", [[1, 2]])


def test_a_slow_maker_is_waited_for(folder):
    def slowly(gather):
        time.sleep(2)
        return read(gather)

    waiting = Waiting(folder, patience=5.0)
    make(folder, slowly)
    assert waiting.answer() == ("shared", [[1, 2]])


def test_each_call_has_its_own_word(folder):
    """A pool of processes starts several runs on one folder; data may change in between."""
    waiting = Waiting(folder, calls=2)
    make(folder)
    assert waiting.answer() == ("shared", [[1, 2]])
    time.sleep(0.3)  # it waits for the second, with the first in sight
    make(folder, lambda gather: read(gather, ids=(7,)), key=OTHER)
    assert waiting.answer() == ("shared", [[7]])


def test_ids_that_are_gone_again_are_read(folder):
    """The maker met an error after it: ours comes too, from our own reading."""
    tokens, _ = make(folder)
    module._calls.clear()
    tokens.store.discard(KEY)
    module._Word(folder).say(key=KEY)
    module._calls.clear()
    assert Waiting(folder, read).answer() == ("alone", [[1, 2]])


def test_a_refused_start_leaves_what_was_there(folder):
    make(folder)[0].keep_only_these()
    refused, _ = make(folder, key=OTHER)
    refused.discard_new()
    again, _ = make(folder, never)
    again.discard_new()  # it did not make these
    assert TokenStore(folder).open(KEY) is not None and TokenStore(folder).open(OTHER) is None
    make(folder, key=OTHER)[0].keep_only_these()
    assert TokenStore(folder).open(KEY) is None and TokenStore(folder).open(OTHER) is not None


def test_one_rank_leaves_no_word(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    make(folder)
    assert [p.name for p in folder.iterdir()] == [KEY]


def test_a_word_names_its_process(folder):
    make(folder)
    said = json.loads(next(folder.glob(".*.word")).read_text())
    assert said["key"] == KEY and said["pid"] == os.getpid()
    assert said["start"] == start_time(os.getpid()) is not None
