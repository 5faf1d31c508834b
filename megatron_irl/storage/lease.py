"""Who a run folder belongs to at the moment: one process at a time, and everybody can see which.

``lease.NNNNNN.json`` in the folder names its holder. A number is taken by making the file, which
only one process can do; whoever takes over from a dead holder makes the next number. A number is
never given away and then taken back, so two that take over at once cannot undo each other.
"""

import contextlib
import json
import os
import re
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_errors
from megatron_irl.storage.processes import start_time, this_host

BEAT_SECONDS = 3.0  # how often a holder says that it lives
STALE_SECONDS = 30.0  # without a sign for so long, a holder on another host is taken for dead
FRESH_SECONDS = 10.0  # after a sign of its own that recent, a holder need not look: nobody else
# could have taken over. Much below STALE_SECONDS.

LEASE_PATTERN = "lease.*.json"


class LeaseLost(UserError):
    """The run folder has been taken over by another process; this one must write nothing more."""


@dataclass(frozen=True)
class Holder:
    """What a lease file says: the process, where it runs and since when."""

    host: str
    pid: int
    started: int | None
    job: str | None
    since: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this_process(cls) -> "Holder":
        pid, now = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(this_host(), pid, start_time(pid), os.environ.get("SLURM_JOB_ID"), now)

    def describe(self) -> str:
        """For messages."""
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host.split()[0]}{job}, since {self.since}"

    def is_here(self) -> bool:
        """Whether it runs, or ran, under this machine's process table."""
        return self.host == this_host()

    def is_alive_here(self) -> bool:
        """Whether it still runs, of a holder on this machine."""
        return self.started is not None and start_time(self.pid) == self.started


class Lease:
    """This process's hold on a run folder, kept alive by a thread until ``release``.

    Example:
        lease = Lease.acquire(folder)   # UserError if another process is at work there
        ...
        lease.check()                   # before every commit; LeaseLost once it was taken over
        lease.release()
    """

    def __init__(self, folder: Path, number: int, token: str) -> None:
        """As ``acquire`` does; for ranks that are told of the hold of rank 0 (no thread)."""
        self.folder, self.number, self.token = folder, number, token
        self._ended = threading.Event()
        self._last_sign = -float("inf")
        self._is_keeper = self._made_folder = False

    @classmethod
    def acquire(cls, folder: Path) -> "Lease":
        """Take the folder, from a dead holder too, or refuse. Creates the folder if need be.

        A holder on this machine is asked for by process id: if it is gone the folder is taken at
        once. One on another machine is watched until it gives a sign (then this call refuses,
        within seconds) or has given none for ``STALE_SECONDS`` (then it is taken for dead).

        Raises:
            UserError: Another process is at work in the folder; it cannot be written.
        """
        made_folder = not folder.exists()
        me = Holder.this_process()
        while True:
            with write_errors(folder):  # each time: a release may take an empty folder away
                folder.mkdir(parents=True, exist_ok=True)
            number = 1 + refuse_if_held(folder)
            if _make(folder, number, me):
                # The number may have been another's, who is gone and whose successor removed it.
                if max(_numbers(folder)) == number:
                    break
                _path(folder, number).unlink(missing_ok=True)  # made from an old listing
            # Someone was faster. Look who it is.
        lease = cls(folder, number, me.token)
        for older in _numbers(folder):  # of dead holders
            if older < number:
                _path(folder, older).unlink(missing_ok=True)
        lease._beat()
        lease._is_keeper, lease._made_folder = True, made_folder
        threading.Thread(target=lease._live, name="lease", daemon=True).start()
        return lease

    def check(self) -> None:
        """Raise LeaseLost unless the folder is still this run's. To be called before a commit.

        Costs nothing while the thread's last look is recent; otherwise it reads a small file.
        """
        if _now() - self._last_sign > FRESH_SECONDS:
            self._look()

    def release(self) -> None:
        """Give the folder back, on the rank that took it; to write after that is an error."""
        self._ended.set()
        self._last_sign = -float("inf")
        with contextlib.suppress(OSError):
            if self._is_keeper and _is_mine(self.folder, self.number, self.token):
                _path(self.folder, self.number).unlink()
                if self._made_folder:  # what was refused before anything was written leaves nothing
                    self.folder.rmdir()  # an OSError where something was

    def _look(self) -> None:
        """Read the lease file; the thread's beat does the same and more."""
        with contextlib.suppress(OSError):
            os.listdir(self.folder)  # a network file system may show the folder as it was
        if not _is_mine(self.folder, self.number, self.token) or _path(
            self.folder, self.number + 1
        ).exists():
            other = _newest_holder(self.folder)
            who = f" by {other.describe()}" if other else ""
            raise LeaseLost(
                f"output_dir={self.folder} was taken over{who}: this process gave no sign for "
                f"{STALE_SECONDS:.0f} seconds or its {_path(self.folder, self.number).name} was "
                "removed. It stops and writes nothing more."
            )

    def _beat(self) -> None:
        """Look, and say that this process lives: by the file's time, which needs no space."""
        begun = _now()  # before the look: a takeover while it lasts is not taken for seen
        self._look()
        os.utime(_path(self.folder, self.number))
        self._last_sign = begun

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # Errors are not for this thread: ``check`` looks for itself once the last sign is old.
            with contextlib.suppress(OSError, UserError):
                self._beat()


def refuse_if_held(folder: Path, *, watch: bool = True) -> int:
    """Raise UserError if a living process holds the folder; else the newest number there, or 0.

    Args:
        watch: Wait for a sign of a holder on another host. False for a first question before data
            is read: such a holder is then left to ``Lease.acquire``, which takes the folder.
    """
    numbers = _numbers(folder)
    if not numbers:
        return 0
    number = numbers[-1]
    holder = _read(folder, number)
    if holder is not None and holder.is_here():
        alive = holder.is_alive_here()
    else:  # elsewhere, or a file that is just being written
        alive = watch and _gives_a_sign(_path(folder, number))
        holder = _read(folder, number)
    if alive and holder is not None:
        raise UserError(
            f"output_dir={folder} is in use by {holder.describe()}. Wait until it has ended, end "
            "it, or set another output_dir. (If that process is not a run of megatron-irl, remove "
            f"{_path(folder, number)}.)"
        )
    return number


def _gives_a_sign(path: Path) -> bool:
    """Watch a lease file until its time changes, at most until its holder counts as dead.

    Only changes are looked at: the clocks of two hosts and of a file server may all differ.
    """
    first, begun = _sign(path), _now()
    while first is not None and _now() - begun < STALE_SECONDS:  # None: released since it was read
        time.sleep(0.2)
        now = _sign(path)
        if now != first:
            return now is not None  # None: released meanwhile
    return False


def _sign(path: Path) -> float | None:
    try:
        with open(path, "rb") as file:  # opening asks a network file system's server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _make(folder: Path, number: int, holder: Holder) -> bool:
    """Make a lease file with its content, if there is none of that number yet."""
    path = _path(folder, number)
    draft = folder / f".{path.name}.{holder.token}.tmp"
    with write_errors(path):
        try:
            with open(draft, "w") as file:
                json.dump(asdict(holder), file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)  # whole or not at all, and only one of many succeeds
            except FileExistsError:
                # Over NFS the answer may be lost after the link was made: the file says whose.
                return _is_mine(folder, number, holder.token)
            except OSError:  # a file system without links
                return _make_exclusively(path, holder)
        except FileNotFoundError:  # the folder went with another's release
            return False
        finally:
            draft.unlink(missing_ok=True)
    return True


def _make_exclusively(path: Path, holder: Holder) -> bool:
    try:
        with open(path, "x") as file:
            json.dump(asdict(holder), file)
    except FileExistsError:
        return False
    return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"lease.{number:06d}.json"


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"lease\.(\d+)\.json", name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in names if match)


def _newest_holder(folder: Path) -> Holder | None:
    """Of the newest lease that can be read."""
    holders = (_read(folder, number) for number in reversed(_numbers(folder)))
    return next((holder for holder in holders if holder is not None), None)


def _read(folder: Path, number: int) -> Holder | None:
    try:
        return Holder(**json.loads(_path(folder, number).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_mine(folder: Path, number: int, token: str) -> bool:
    holder = _read(folder, number)
    return holder is not None and holder.token == token


def _now() -> float:
    """Seconds that go on while the machine sleeps: a lease runs out in that time too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
