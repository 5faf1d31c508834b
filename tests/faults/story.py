"""A run that is hit again and again until it is done, and compared with one that was left alone."""

import random
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_irl.errors import STOPPED
from tests.faults.cases import write_recipe
from tests.faults.forked import Zygote
from tests.faults.instants import instant_of, unfinished_saves
from tests.faults.process import Start
from tests.golden.trajectory import Trajectory, read_trajectory

KINDS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
TARGETS = ("rank", "launcher", "tree")
EARLY_SHARE = 0.15  # of the faults come while the processes are starting
FURTHEST = 0.7  # of what is left to do, a fault comes at most so far into it
LONGEST_DELAY = 0.5  # seconds between that place and the signal: what lies between two files too
AT_SAVE_SHARE = 0.4  # of the faults wait for the next checkpoint to be begun, and come within
LONGEST_IN_SAVE = 0.15  # seconds of that
STEPS_AFTER_TERM = 2  # the one under way, and one that began while the signal was passed on


@dataclass
class Fault:
    """What was done to a start, and how that ended.

    Attributes:
        at: Seconds after the run folder was taken (before: after the start, negative).
        during: What the run was doing; see ``instants``.
        code: Of the launcher; None: it hung.
        seconds: From the signal until the launcher had ended.
        steps: Lines of ``metrics.jsonl`` after the end.
        saved: Step of the newest checkpoint after the end, -1 without one.
        wrong: What must not be.
    """

    kind: str
    target: str
    at: float
    during: str
    code: int | None
    seconds: float
    steps: int
    saved: int
    wrong: list[str] = field(default_factory=list)


@dataclass
class Story:
    """A run and its faults; ``wrong`` says what differs from the uninterrupted run.

    Attributes:
        mode: Whether its starts were ``fresh`` processes or ``forked`` ones.
    """

    case: str
    seed: int
    kind: str
    mode: str
    faults: list[Fault]
    wrong: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: what it did, seconds until it took the folder, and its progress."""

    trajectory: Trajectory
    opening: float
    progress: int


def make_reference(case: str, root: Path, zygote: Zygote | None = None) -> Reference:
    """Run a case to its end."""
    folder = root / f"{case}_whole_{mode_of(zygote)}"
    start = Start(write_recipe(case, root, folder), folder, zygote)
    try:
        code = start.finish()
        assert code == 0, start.log.read_text()
        opened = start.opened_at or 0.0
        return Reference(read_trajectory(folder), opened, progress_of(folder))
    finally:
        start.end()


def mode_of(zygote: Zygote | None) -> str:
    return "fresh" if zygote is None else "forked"


def tell_story(
    case: str, root: Path, reference: Reference, *, kind: str, seed: int, num_faults: int,
    zygote: Zygote | None = None,
) -> Story:
    """Run a case, hit it ``num_faults`` times (fewer if it is done before), and let it finish."""
    begun, rng = time.monotonic(), random.Random(f"{case} {kind} {seed}")
    folder = root / f"{case}_{kind}_{seed}"
    recipe = write_recipe(case, root, folder)
    faults: list[Fault] = []
    wrong: list[str] = []
    while len(faults) < num_faults and not wrong:
        fault = _hit_once(recipe, folder, kind, rng, reference, zygote)
        if fault is None:
            break
        faults.append(fault)
        wrong += fault.wrong
    if not wrong:
        wrong += _finish(recipe, folder, reference, zygote)
    return Story(case, seed, kind, mode_of(zygote), faults, wrong, time.monotonic() - begun)


def _hit_once(
    recipe: Path, folder: Path, kind: str, rng: random.Random, reference: Reference,
    zygote: Zygote | None,
) -> Fault | None:
    """One start and one fault at a random place; None if the run was done before it."""
    target, early = rng.choice(TARGETS), rng.random() < EARLY_SHARE
    share, which, delay = rng.random(), rng.random(), rng.random()
    at_save = rng.random() < AT_SAVE_SHARE
    done = progress_of(folder)
    due = done + share * FURTHEST * (reference.progress - done)
    left = unfinished_saves(folder)
    start = Start(recipe, folder, zygote)
    try:
        while start.look() is None:
            if early and start.seconds >= share * reference.opening:
                break
            if start.opened_at is not None and progress_of(folder) >= due:
                if at_save:
                    while unfinished_saves(folder) <= left and start.look() is None:
                        time.sleep(0.002)
                time.sleep(delay * (LONGEST_IN_SAVE if at_save else LONGEST_DELAY))
                break
            time.sleep(0.02)
        if start.launcher.poll() == 0:
            return None
        ranks = start.ranks()
        pids = {"rank": ranks[int(which * len(ranks)) :][:1], "launcher": [start.launcher.pid],
                "tree": start.processes()}[target] or [start.launcher.pid]
        at = start.seconds - (start.opened_at if start.opened_at is not None else 1e3)
        steps, hit_at = _steps(folder), time.monotonic()
        start.hit(KINDS[kind], pids)
        during = instant_of(folder, is_open=start.opened_at is not None, left=left)
        code = start.finish()
        fault = Fault(kind, target, round(at, 2), during, code,
                      round(time.monotonic() - hit_at, 2), _steps(folder), _saved(folder))
        fault.wrong = _judge(fault, start, steps)
        return fault
    finally:
        start.end()


def _judge(fault: Fault, start: Start, steps: int) -> list[str]:
    """What is wrong with an end; ``steps`` were taken when the signal came."""
    wrong = []
    if fault.code is None:
        wrong.append("hangs")
    left = start.left() if fault.code is not None else []
    if left:
        wrong.append(f"left behind: {left}")
    if fault.kind == "kill":
        return wrong
    text = start.log.read_text(errors="replace")
    # Before its handlers are there a process dies of the signal, as any other.
    expected = {0, STOPPED} | ({-signal.SIGTERM} if start.opened_at is None else set())
    if fault.code not in expected:
        wrong.append(f"exit code {fault.code}: {text[-2000:]}")
    if "Traceback" in text:
        wrong.append(f"traceback: {text[-2000:]}")
    if fault.code == STOPPED and fault.steps > max(fault.saved, 0):
        wrong.append(f"{fault.steps} steps were taken and {fault.saved} saved")
    if fault.code == STOPPED and fault.steps > steps + STEPS_AFTER_TERM:
        wrong.append(f"{fault.steps - steps} steps after the signal")
    return wrong


def _finish(
    recipe: Path, folder: Path, reference: Reference, zygote: Zygote | None
) -> list[str]:
    """Let the run finish; what differs from the reference."""
    start = Start(recipe, folder, zygote)
    try:
        code = start.finish()
        if code != 0:
            return [f"the last start ends with {code}: {start.log.read_text()[-3000:]}"]
        found, left = read_trajectory(folder), start.left()
        differing = differences(reference.trajectory, found)
        return ([f"left behind: {left}"] if left else []) + (
            [f"differs in {', '.join(differing)}"] if differing else [])
    finally:
        start.end()


def differences(reference: Trajectory, found: Trajectory) -> list[str]:
    """What is not bitwise the same, by name."""
    return [key for key, value in reference.items() if found[key] != value]


def progress_of(folder: Path) -> int:
    """How far a run is, whatever the machine's speed: its steps and the parts of its banks."""
    return _steps(folder) + sum(1 for _ in folder.rglob("part_*.parquet"))


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _saved(folder: Path) -> int:
    names = [p.name.removeprefix("step_") for p in (folder / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)
