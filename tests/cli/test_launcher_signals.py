"""What the command that starts its own ranks does with signals; its ranks here are a few lines."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_two_starts import ours

ROOT = Path(__file__).parents[2]
LAUNCH = "import sys; from megatron_irl.cli.ranks import run_ranks; " \
    "sys.exit(run_ranks([], 2, ('-c', open('rank.py').read())))"
# Each rank says which signals it got; it ends as asked after a while, or never.
RANK = """
import os, signal, sys, time
name = f"rank{os.environ['RANK']}"
got = []
def take(number, frame):
    got.append(signal.Signals(number).name)
    open(name, "w").write(" ".join(got))
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, take)
open(name, "w").close()
while not got or %r:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit(75)
"""


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(program):
        (tmp_path / "rank.py").write_text(program)
        process = subprocess.Popen([sys.executable, "-c", LAUNCH], cwd=tmp_path,
                                   env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
        started.append(process)
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"rank{r}").exists() for r in (0, 1)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_the_ranks_may_finish(launch, tmp_path, number):
    process = launch(RANK % False)
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == [number.name] * 2


def test_a_second_interrupt_ends_ranks_that_do_not(launch, tmp_path):
    process = launch(RANK % True)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while not (tmp_path / "rank1").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 1
    assert ours(tmp_path) == []


def test_a_killed_launcher_takes_its_ranks_with_it(launch, tmp_path):
    follow = "from megatron_irl.cli.ranks import follow_launcher; follow_launcher()\n"
    process = launch(follow + RANK % True)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while ours(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ours(tmp_path) == []


def test_the_code_of_a_hang_is_the_launchers(launch):
    process = launch(RANK.replace("sys.exit(75)", "sys.exit(76)") % False)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 76


# Ranks that find the same mistake seconds apart, as on a busy machine: rank 1 tells, and rank 0,
# which the launcher has not ended yet, has the same to say.
MISTAKEN = """
import os, signal, sys, time
from megatron_irl import cli
from megatron_irl.errors import UserError
rank = os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda number, frame: None)
def fail(options, argv):
    if rank == "0":
        time.sleep(6.5)
    raise UserError("the recipe is wrong")
cli._train = fail
open("rank" + rank, "w").close()
sys.exit(cli.main(["train", "recipe.yaml"]))
"""


def test_a_mistake_that_every_rank_finds_is_told_once(launch, tmp_path, capfd):
    process = launch(MISTAKEN)
    assert process.wait(timeout=30) == 2
    assert capfd.readouterr().err.count("the recipe is wrong") == 1
