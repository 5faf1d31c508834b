"""Processes of a run: taken from torchrun or srun, or started here on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_irl.cli.ports import free_port, slurm_port
from megatron_irl.errors import HUNG, STOPPED, UserError
from megatron_irl.storage.processes import end_with_parent

# Slurm's names, the first that is set. A shell in an allocation of four tasks has SLURM_NTASKS=4
# though its own step has one, so what is said of the step comes first.
_SLURM = {
    "RANK": ("SLURM_PROCID",),
    "WORLD_SIZE": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    "LOCAL_RANK": ("SLURM_LOCALID",),
}

_LAUNCHER = "MEGATRON_IRL_LAUNCHER"  # process id, given to the ranks
_WORD = "MEGATRON_IRL_WORD"  # descriptor of a pipe with one byte, for the rank that may tell
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_LEAVE_SECONDS = 60.0  # between the first rank that stops as asked and the last
_word: int | None = None  # this rank's, see ``may_tell``


def adopt_environment() -> int | None:
    """World size if a launcher started this process, else None.

    torchrun sets ``RANK`` and friends. Under srun they are derived from Slurm's variables, with
    the first node of the job as the meeting point.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _world_size()
    # A batch script has SLURM_PROCID too; only tasks started by srun have a step.
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        found = {name: _slurm_value(sources) for name, sources in _SLURM.items()}
        if "MASTER_ADDR" not in os.environ:
            # One task meets nobody, and an interactive shell may have no scontrol.
            found["MASTER_ADDR"] = "127.0.0.1" if found["WORLD_SIZE"] == "1" else (
                _first_slurm_host())
        os.environ.update(found)
        os.environ.setdefault("MASTER_PORT", str(slurm_port()))
        return _world_size()
    return None


def _slurm_value(sources: Sequence[str]) -> str:
    value = next((os.environ[name] for name in sources if os.environ.get(name)), None)
    if value is None:
        raise UserError(f"this is a task of a Slurm step (SLURM_STEP_ID="
                        f"{os.environ['SLURM_STEP_ID']}), but {' and '.join(sources)} "
                        f"{'is' if len(sources) == 1 else 'are'} not set. Start with srun, or set "
                        "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.")
    return value


def _world_size() -> int:
    sizes = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    if not all(value.isdecimal() for value in sizes.values()):
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise UserError(f"{given}: both must be whole numbers. Start with torchrun or srun.")
    return int(sizes["WORLD_SIZE"])


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if shutil.which("scontrol") is None:
        raise UserError(
            "MASTER_ADDR is not set and scontrol is not on the PATH to find the first node of "
            f"{nodes!r}. Export MASTER_ADDR in the job script."
        )
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        reason = done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        done, reason = None, str(error)
    if done is None or done.returncode or not done.stdout.split():
        raise UserError(
            f"MASTER_ADDR is not set and `{' '.join(command)}` did not name the first node: "
            f"{reason}. Export MASTER_ADDR in the job script."
        )
    return done.stdout.split()[0]


def run_ranks(
    argv: list[str], world_size: int, program: Sequence[str] = ("-m", "megatron_irl")
) -> int:
    """Start ``world_size`` copies of this command on this machine; returns the exit code.

    When one rank fails the others are ended, and its code is returned. A signal is passed on to the
    ranks, once each, and they decide: training finishes its step and saves. A second SIGINT ends
    them. Threads are shared out between the ranks unless OMP_NUM_THREADS is set.
    """
    threads = max(1, (os.cpu_count() or 1) // world_size)
    word, written = os.pipe()
    os.write(written, b"1")
    os.set_blocking(word, False)
    shared = os.environ | {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        _LAUNCHER: str(os.getpid()), _WORD: str(word),
    }
    shared.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, *program, *argv]
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        del frame
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)
        _signal_each(ranks, number)

    # Before the first rank is there: none may be left behind by a signal that comes early.
    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        for rank in range(world_size):
            if asked:
                return STOPPED
            # A session each: what a rank starts ends with it. A launcher that is killed outright
            # can end nobody; its ranks ask the kernel to (see ``follow_launcher``).
            ranks.append(subprocess.Popen(
                command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True, pass_fds=(word,),
            ))
        if asked:  # the last rank may have come too late for it
            _signal_each(ranks, signal.SIGTERM)
        return _wait(ranks, asked)
    except KeyboardInterrupt:
        _signal(ranks, signal.SIGKILL)
        return 1
    finally:
        _end(ranks)
        os.close(word)
        os.close(written)
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """End this process with the command that started it as a rank, if one did; to be called early.

    Otherwise the ranks of a launcher that was killed would work on for as long as they can, and
    hold the run folder.

    What the launcher has given to its ranks is taken out of the environment here: a command that a
    rank starts is none of them.
    """
    global _word
    word, launcher = os.environ.pop(_WORD, ""), os.environ.pop(_LAUNCHER, "")
    _word = int(word) if word.isdecimal() else None
    if launcher.isdecimal():
        end_with_parent(int(launcher))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def may_tell() -> bool:
    """Whether the user has not been told yet why the ranks of this launcher end; true once.

    Ranks find the same mistake in a recipe, each when it comes to it, which on a busy machine is
    seconds apart. Without a launcher on this machine every rank may.
    """
    if _word is None:
        return True
    try:
        return os.read(_word, 1) == b"1"
    except BlockingIOError:  # another rank has read it
        return False


def _wait(ranks: list[subprocess.Popen[bytes]], asked: Sequence[int]) -> int:
    """Until all ranks have ended, or one has failed.

    Args:
        asked: The signals that were passed on so far; a rank that had no handler yet dies of one.
    """
    stopped_at: float | None = None
    while True:
        codes = [process.poll() for process in ranks]
        as_asked = {STOPPED, *(-number for number in asked)}
        if any(code and code not in as_asked for code in codes):
            # One message is for the user: rank 0's if it fails with the others.
            time.sleep(1.0)
            codes = [process.poll() for process in ranks]
            return next((code for code in (2, HUNG) if code in codes), 1)
        if None not in codes:
            return STOPPED if any(codes) else 0
        if any(codes):
            stopped_at = stopped_at or time.monotonic()
            # A rank killed before it listened leaves the others waiting for it.
            patience = _LEAVE_SECONDS if set(codes) <= {STOPPED, None} else 1.0
            if time.monotonic() - stopped_at > patience:
                return STOPPED
        time.sleep(0.1)


def _signal_each(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Signal every rank, and nothing that it started: it may need that to save."""
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    """Signal every rank and what it started; those that are gone are skipped."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    _signal(ranks, signal.SIGTERM)
    deadline = time.monotonic() + 5
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in ranks:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
    _signal(ranks, signal.SIGKILL)
    for process in ranks:
        process.wait()
