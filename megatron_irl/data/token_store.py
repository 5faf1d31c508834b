"""A corpus on disk: tokenised once, then mapped by every rank of the machine and every resume."""

import os
import re
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow

from megatron_irl.data.corpus import Corpus, Fill, Gather
from megatron_irl.data.demonstrations import LoadReport
from megatron_irl.data.preferences import Preference
from megatron_irl.data.token_table import (
    DEMONSTRATIONS,
    PREFERENCES,
    TableWriter,
    demonstrations_in,
    preferences_in,
)
from megatron_irl.storage.commit import (
    checked_json,
    entry_of,
    read_json,
    sync_folder,
    write_errors,
)
from megatron_irl.types import Demonstration

SUMMARY = "corpus.json"
ABANDONED_SECONDS = 3600.0  # since the last write to a part that nobody finished
_OURS = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{32}\.partial|\.[0-9a-f]{16}\.word"
                   r"|\.\..*\.tmp")


class TokenStore:
    """Corpora in a folder, each in a folder of its own whose name is its key.

    One that is there is whole: it is filled under another name and renamed, and never changed. Of
    several writers of one key the first to finish wins, and the others use what it wrote.

    Attributes:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Path] = []  # folders that were not there before, the innermost first

    def open(self, key: str) -> Corpus | None:
        """The corpus of a key; None if there is none, or none that can be read."""
        place = self.folder / key
        try:
            said = read_json(place / SUMMARY) or {}
            for name, known in said.get("files", {}).items():  # a run of 0.1.0 has none
                if entry_of(place / name) != known:
                    return None
            report = said.pop("report")
            remarks = {name: (count, first) for name, (count, first) in report["remarks"].items()}
            return Corpus(
                demonstrations_in(place / "train.arrow"), demonstrations_in(place / "eval.arrow"),
                preferences_in(place / "preferences.arrow"),
                preferences_in(place / "eval_preferences.arrow"),
                digest=said["digest"], notes=tuple(said["notes"]),
                report=LoadReport(**report | {"remarks": remarks}),
            )
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
            return None  # nothing is lost: it is made again of the user's files

    def build(self, key: str, read: Callable[[Gather], Corpus]) -> Corpus:
        """Write what ``read`` reads, and return it as it is on disk.

        Args:
            read: Given what takes its demonstrations in, so that no list of them is made.

        Raises:
            UserError: Whatever ``read`` finds; or the disk is full. Nothing is left behind.
        """
        final = self.folder / key
        partial = self.folder / f".{key}.{uuid.uuid4().hex}.partial"
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        with write_errors(final):
            try:
                partial.mkdir(parents=True)
                self._discard_abandoned()
                self._write(partial, read)
                self._commit(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                self._unmake()
                raise
        found = self.open(key)
        assert found is not None, f"{final} was written and cannot be read"
        return found

    def keep_only(self, key: str) -> None:
        """Remove the corpora of other keys. Processes that have one mapped are not disturbed."""
        for path in self.folder.glob("*"):
            if re.fullmatch(r"[0-9a-f]{32}", path.name) and path.name != key:
                shutil.rmtree(path, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove one corpus, and with it the folders that ``build`` made for it."""
        shutil.rmtree(self.folder / key, ignore_errors=True)
        self._unmake()

    def _unmake(self) -> None:
        """A start that failed leaves the output folder as it found it."""
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or gone

    def _write(self, folder: Path, read: Callable[[Gather], Corpus]) -> None:
        def in_file(
            name: str, fill: Fill
        ) -> tuple[Sequence[Demonstration], LoadReport]:
            path = folder / f"{name}.arrow"
            with TableWriter(path, DEMONSTRATIONS) as table:
                report = fill(table.demonstration)
            return demonstrations_in(path), report

        corpus = read(in_file)
        if not (folder / "eval.arrow").exists():
            in_file("eval", lambda keep: LoadReport())
        _write_preferences(folder / "preferences.arrow", corpus.preferences)
        _write_preferences(folder / "eval_preferences.arrow", corpus.heldout_preferences)
        (folder / SUMMARY).write_bytes(checked_json({
            "digest": corpus.digest, "notes": corpus.notes, "report": _counts(corpus.report),
            "files": {path.name: entry_of(path) for path in sorted(folder.glob("*.arrow"))},
        }))

    def _commit(self, partial: Path, final: Path) -> None:
        for path in (*partial.iterdir(), partial):
            sync_folder(path)
        if final.exists() and self.open(final.name) is None:
            shutil.rmtree(final, ignore_errors=True)  # damaged since
        try:
            os.rename(partial, final)  # fails if that has something in it: the race is noticed
        except OSError:
            if self.open(final.name) is None:
                raise
            shutil.rmtree(partial, ignore_errors=True)  # another machine was first
        sync_folder(self.folder)

    def _discard_abandoned(self) -> None:
        """Remove what writers that were killed have left."""
        for path in self.folder.glob(".*.partial"):
            times = [_modified(p) for p in (path, *path.glob("*"))]
            if time.time() - max(times) > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def is_token_store(folder: Path) -> bool:
    """Whether a folder has nothing in it but what this module and its users write."""
    return folder.is_dir() and all(_OURS.fullmatch(p.name) for p in folder.iterdir())


def _write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    with TableWriter(path, PREFERENCES) as table:
        for each in preferences:
            table.preference(each)


def _counts(report: LoadReport) -> dict[str, Any]:
    """A report without the lengths of all records, which only ``plan --show`` wants."""
    said = asdict(replace(report, prompt_lengths=array("i"), response_lengths=array("i")))
    return {name: value for name, value in said.items() if not isinstance(value, array)}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()  # somebody is at work on it

