"""One rank of a machine makes the token ids; the others wait for them, or for its error.

There is no process group yet: what is wrong with the user's data is to be known before one is made.
So the ranks of a machine speak through a file beside the ids, the *word*, which says who makes them
and then what came of it. Nobody waits for a process that has ended: whoever finds no living maker
reads the data for itself, and finds the same ids or the same error.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_irl.data.corpus import Corpus, Gather
from megatron_irl.data.token_store import TokenStore
from megatron_irl.errors import UserError, tell_elsewhere
from megatron_irl.parallel.main_rank import AnotherRankFailed
from megatron_irl.storage.commit import write_errors
from megatron_irl.storage.processes import start_time, this_host

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 120.0  # until the maker's first word: ranks start one after another
LINGER_SECONDS = 0.5  # of a maker that failed, so that the waiting hear it from a living process

# Calls of this process by folder and meeting point of its ranks: a process may be of several starts
# one after another, and a word is of one call. The ranks of a start make the same calls.
_calls: Counter[tuple[Path, str]] = Counter()


@dataclass
class Tokens:
    """Where a run keeps token ids, and how a rank comes by them.

    Attributes:
        store: In the run's folder.
        key: Of the ids this process made or found; None where another one did.
        is_new: This process made them.
    """

    store: TokenStore
    key: str | None = None
    is_new: bool = False

    def corpus(
        self, key_of: Callable[[], str], read: Callable[[Gather | None], Corpus]
    ) -> Corpus:
        """Make, find or wait for the ids. Every rank of the machine must call; no collectives.

        Args:
            key_of: Names what is read; called by the maker alone, since it reads all files.
            read: Reads it, into what it is given.

        Raises:
            UserError: Something is wrong with the data; on the ranks that waited, marked as told by
                another.
            AnotherRankFailed: The maker failed otherwise; its own output has the traceback.
        """
        word = _Word(self.store.folder)
        if not is_maker():
            said = word.wait()
            if said is not None and said.get("error") is not None:
                _raise(said)
            found = self.store.open(said["key"]) if said is not None else None
            # No maker, or taken away since because it met an error later: that will be ours too.
            return found if found is not None else read(None)
        word.say()
        try:
            self.key = key_of()
            found = self.store.open(self.key)
            if found is None:
                found, self.is_new = self.store.build(self.key, read), True
        except Exception as error:  # whatever it is: the others must hear of it
            is_user = isinstance(error, UserError)
            word.say(error=str(error) if is_user else repr(error), is_user=is_user)
            if word.is_needed:
                time.sleep(LINGER_SECONDS)
            raise
        word.say(key=self.key)
        return found

    def keep_only_these(self) -> None:
        """Remove other ids from the run's folder, which must be held: they may be another run's."""
        if self.key is not None:
            self.store.keep_only(self.key)

    def discard_new(self) -> None:
        """Remove what a start that was refused has made."""
        if self.key is not None and self.is_new:
            self.store.discard(self.key)


def is_maker() -> bool:
    """Whether this is the rank of its machine that reads and tokenises."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Word:
    """What the maker of a machine says; a file by machine, since they may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._host = this_host()
        name = hashlib.blake2b(self._host.encode(), digest_size=8).hexdigest()
        self._path = folder / f".{name}.word"
        ranks = " ".join(os.environ.get(name, "")
                         for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
        _calls[folder, ranks] += 1
        self._call = f"{ranks} {_calls[folder, ranks]}"

    @property
    def is_needed(self) -> bool:
        return os.environ.get("WORLD_SIZE", "1") != "1"

    def say(self, **what: Any) -> None:
        """Say it to the ranks of this machine, if there are any."""
        if self.is_needed:
            own = {"pid": os.getpid(), "start": start_time(os.getpid()), "call": self._call}
            # Under a name of its own: two launchers on one machine make two who speak.
            mine = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            with write_errors(self._path):
                mine.parent.mkdir(parents=True, exist_ok=True)
                mine.write_text(json.dumps(own | what))
                mine.replace(self._path)

    def wait(self) -> dict[str, Any] | None:
        """The maker's last word; None if there is no living maker."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            said = self._read()
            # A word of an earlier start, of another call, or of a process that is gone, is none.
            if said is not None and said["call"] == self._call and _lives(said):
                if "key" in said or "error" in said:
                    return said
                # It is at work, for as long as it takes.
                deadline = time.monotonic() + PATIENCE_SECONDS / 10
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None  # not there yet


def _lives(said: dict[str, Any]) -> bool:
    """Whether the process that spoke has not ended: words of earlier starts are left lying."""
    return said["start"] is not None and start_time(said["pid"]) == said["start"]


def _raise(said: dict[str, Any]) -> None:
    if said["is_user"]:
        raise tell_elsewhere(UserError(said["error"]))
    raise AnotherRankFailed(f"the rank that reads this machine's data failed: {said['error']}")
