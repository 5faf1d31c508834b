"""The durable store of a run's pairs: Parquet parts, committed by rename, and their manifest."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_irl.data.pair_file import MANIFEST, described, part_file, read_part_file
from megatron_irl.data.pair_table import FORMAT_VERSION, Part, to_pairs
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import TEMPORARY_PATTERN, replacing
from megatron_irl.types import Demonstration, Pair

Bounds = Sequence[tuple[int, int]]
Manifest = dict[int, Part]
"""The parts of a finished round by number."""

PLAN = "plan.json"


class PairBank:
    """Pairs of every round under ``<root>/round_NNNN/part_NNNNN.parquet``.

    A round is planned (``begin_round``), written part by part in any order and by any process
    (``write_part``), and finished with a manifest (``finish_round``). A part exists whole or not
    at all and says itself, by a digest of its values, whether it is what was written; so a run
    killed at any instant goes on from the parts it committed. Later versions of a part (with
    references, with rewards) replace it, and ``finish_round`` brings the manifest up to date.
    Log-probabilities are float32, as they are computed: what comes back is what was written.

    This class asks nobody else; ``SharedBank`` makes its answers the same on every rank.

    Example:
        bank = PairBank(folder / "pairs", seed=1234)
        for part, (first, last) in enumerate(bank.begin_round(0, [(0, 256), (256, 500)])):
            if part not in bank.done_parts(0):
                bank.write_part(0, part, sample(first, last))
        bank.finish_round(0)
        pairs = bank.read_round(0)
    """

    patience = 0.0  # seconds to wait for a file that a manifest from another host speaks of

    def __init__(
        self, root: str | Path, seed: int | None = None, fence: Callable[[], None] | None = None
    ) -> None:
        """Open the bank; nothing is read or created yet.

        Args:
            root: The run's ``pairs`` folder; created by the first write.
            seed: The run's seed. Recorded in every part, and compared on reading unless None.
            fence: Called before every commit; raises if the folder is not ours any more.
        """
        self.root = Path(root)
        self.seed = seed
        self._fence = fence or (lambda: None)

    # --- writing

    def begin_round(self, round: int, bounds: Bounds) -> list[tuple[int, int]]:
        """Record which of the round's prompts each part has; returns the plan that holds.

        A round begun before, over as many prompts, keeps the plan it has: another parallel layout
        would divide it otherwise. A plan over another number of prompts is replaced, and what was
        sampled under it removed.

        Args:
            bounds: By part, the first of its prompts and the one after its last, without gaps.

        Raises:
            UserError: The folder cannot be written.
        """
        bounds = [(int(first), int(last)) for first, last in bounds]
        known = self.plan(round)
        if known is not None and known[-1:] and bounds[-1:] and known[-1][1] == bounds[-1][1]:
            return known
        if known is not None and known != bounds:
            self.forget(round)
        text = {"format_version": FORMAT_VERSION, "bounds": bounds}
        self._commit(self._folder(round) / PLAN, json.dumps(text).encode())
        return bounds

    def write_part(self, round: int, part: int, pairs: Sequence[Pair]) -> Part:
        """Commit a part, replacing an earlier version (to add references or rewards).

        Parts are written independently: by several processes at a time, one each.

        Raises:
            UserError: The disk is full or the folder cannot be written; nothing is left behind.
        """
        entry, content = part_file(round, part, pairs, self.seed)
        self._commit(self._part_path(round, part), content)
        return entry

    def finish_round(self, round: int, parts: Iterable[Part] | None = None) -> Manifest:
        """Commit the manifest of a round whose parts are all there, for one process.

        Args:
            parts: What ``write_part`` returned; None asks the files.

        Raises:
            UserError: A part of the plan is missing or was never committed.
        """
        if parts is None:
            parts = [self.describe(round, number) for number in self._on_disk(round)]
        manifest = {part.number: part for part in sorted(parts, key=lambda part: part.number)}
        plan = self.plan(round)
        self._check_whole(round, range(len(plan) if plan else len(manifest)), manifest)
        text = {
            "format_version": FORMAT_VERSION, "seed": self.seed, "bounds": plan,
            "rows": sum(part.rows for part in manifest.values()),
            "parts": [{"file": self._part_path(round, n).name, **part.to_json()}
                      for n, part in manifest.items()],
        }
        self._commit(self._folder(round) / MANIFEST, json.dumps(text, indent=1).encode())
        return manifest

    def discard_others(
        self, round: int, parts: Sequence[Sequence[Demonstration]],
        on_part: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Remove parts that are not of these demonstrations, or damaged; which ones are left?

        A held-out set may change while a run is stopped; what was sampled for another one is not
        to be taken for samples of this one.

        Args:
            parts: By part, the demonstration of every pair in order.
            on_part: Called before each is read; a round's can take minutes.

        Returns:
            Their numbers, ascending: they are whole, read and verified.
        """
        left = []
        for number in self._on_disk(round):
            on_part()
            expected = parts[number] if number < len(parts) else []
            try:
                pairs = self._read_pairs(round, number, None)
            except UserError:  # cut or changed: it is sampled again, to the same
                pairs = []
            if len(pairs) != len(expected) or not all(map(_is_of, pairs, expected)):
                self._fence()
                self._path(round, number).unlink()
            else:
                left.append(number)
        return left

    # --- reading

    def plan(self, round: int) -> list[tuple[int, int]] | None:
        """What ``begin_round`` recorded, or None. A plan cut by a power failure is none."""
        try:
            bounds = json.loads((self._folder(round) / PLAN).read_text())["bounds"]
            return [(int(first), int(last)) for first, last in bounds]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def manifest(self, round: int) -> Manifest | None:
        """The parts of a finished round, or None where it is not finished.

        Raises:
            UserError: The manifest is damaged.
        """
        path = self._folder(round) / MANIFEST
        try:
            text = json.loads(path.read_text())
            parts = [{k: v for k, v in part.items() if k != "file"} for part in text["parts"]]
            return {part["number"]: Part(**part) for part in parts}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error}. Delete it; the parts beside it say "
                            "themselves what they are.") from error

    def require(self, round: int) -> Manifest:
        """As ``manifest``, of a round that a later one trains on too.

        Raises:
            UserError: The round is not finished: it was when the later one began.
        """
        manifest = self.manifest(round)
        if manifest is None:
            raise UserError(f"{self._folder(round)} is gone or lacks parts, and a later round "
                            "trains on its pairs too. Restore the folder, or start a new "
                            "output_dir.")
        return manifest

    def parts(self, round: int) -> list[int]:
        """The numbers of the round's parts, ascending: the manifest's, or those that are there."""
        manifest = self.manifest(round)
        return self._on_disk(round) if manifest is None else sorted(manifest)

    def done_parts(self, round: int) -> list[int]:
        """The numbers of the parts that are whole, read and verified, ascending."""
        whole = []
        for number in self._on_disk(round):
            try:
                self.verify(round, number)
            except UserError:  # not to be trusted, so as good as absent; it will be written again
                continue
            whole.append(number)
        return whole

    def read_part(self, round: int, part: int) -> list[Pair]:
        """Return the pairs of a part, in the order written.

        Raises:
            UserError: It is not there, is damaged, is not the one that the round's manifest
                speaks of, or belongs to a run of another seed.
        """
        manifest = self.manifest(round)
        if manifest is not None and part not in manifest:
            raise UserError(f"{self._folder(round) / MANIFEST} has no part {part}.")
        return self._read_pairs(round, part, None if manifest is None else manifest[part])

    def read_round(self, round: int) -> list[Pair]:
        """Return all pairs of a round, part by part.

        Raises:
            UserError: A part is missing, or as ``read_part``.
        """
        parts = self.parts(round)
        self._check_whole(round, range(max(parts) + 1) if parts else [], parts)
        return [pair for part in parts for pair in self.read_part(round, part)]

    def has_references(self, round: int) -> bool:
        """Whether the round is finished, and every pair of it has both reference values."""
        manifest = self.manifest(round)
        return bool(manifest) and all(part.references for part in manifest.values())

    def verify(self, round: int, part: int) -> Part:
        """What a part is, found by reading all of it. Raises UserError unless it is whole."""
        return Part.of(part, self._read(round, part))

    def describe(self, round: int, part: int) -> Part:
        """What a part says of itself; parts of 0.1.0 and damaged ones are read to find out."""
        return described(self._path(round, part)) or self.verify(round, part)

    # --- resuming

    def rounds(self) -> list[int]:
        """The rounds that have a folder, ascending."""
        names = (re.fullmatch(r"round_(\d+)", folder.name) for folder in _list(self.root))
        return sorted(int(match[1]) for match in names if match)

    def discard_after(self, round: int) -> None:
        """Remove the rounds after ``round`` (-1: all) and leftovers of killed writes.

        For resuming: what a checkpoint does not know of is drawn again.
        """
        for later in self.rounds():
            if later > round:
                self.forget(later)
        for leftover in self.root.glob(f"round_*/{TEMPORARY_PATTERN}"):
            leftover.unlink()

    def forget(self, round: int) -> None:
        """Remove everything of a round."""
        self._fence()
        shutil.rmtree(self._folder(round), ignore_errors=True)

    def reopen(self, round: int) -> None:
        """Take back that a round is finished; its parts stay."""
        self._fence()
        (self._folder(round) / MANIFEST).unlink(missing_ok=True)

    # --- files

    def _folder(self, round: int) -> Path:
        return self.root / f"round_{round:04d}"

    def _part_path(self, round: int, part: int) -> Path:
        return self._folder(round) / f"part_{part:05d}.parquet"

    def _commit(self, path: Path, content: Any) -> None:
        self._fence()
        with replacing(path) as file:
            file.write(content)

    def _path(self, round: int, part: int) -> Path:
        """Where a part is: under its name, or under the one that release 0.1.0 gave it."""
        path = self._part_path(round, part)
        old = path.with_name(f"chunk_{part:05d}.parquet")
        return old if not path.exists() and old.exists() else path

    def _check_whole(self, round: int, wanted: Iterable[int], found: Iterable[int]) -> None:
        missing = sorted(set(wanted) - set(found))
        if missing:
            raise UserError(f"{self._folder(round)} lacks parts {missing}. Resume the run that "
                            "wrote it, or delete the folder to generate the round again.")

    def _on_disk(self, round: int) -> list[int]:
        names = (re.fullmatch(r"(?:part|chunk)_(\d+)\.parquet", path.name)
                 for path in _list(self._folder(round)))
        return sorted({int(match[1]) for match in names if match})

    def _read_pairs(self, round: int, part: int, known: Part | None) -> list[Pair]:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return list(to_pairs(self._read(round, part, known)))
            except UserError:
                # A network file system may show another host's commit some seconds late.
                if known is None or time.monotonic() >= deadline:
                    raise
                _list(self._folder(round))  # asks the server again
                time.sleep(0.5)

    def _read(self, round: int, part: int, known: Part | None = None) -> pa.Table:
        return read_part_file(self._path(round, part), self.seed, known)


def _is_of(pair: Pair, demonstration: Demonstration) -> bool:
    return np.array_equal(pair.prompt_ids, demonstration.prompt_ids) and np.array_equal(
        pair.demo_ids, demonstration.response_ids
    )


def _list(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
