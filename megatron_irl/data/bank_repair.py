"""What the run that resumes does to its bank before it goes on; nobody else changes a round.

Rounds of release 0.1.0 (other file names, no digests, no manifest) are brought into today's
form; everybody else reads them as they are (see ``pair_file``).
"""

import contextlib
import json
from pathlib import Path

from megatron_irl.data.pair_bank import Manifest, PairBank
from megatron_irl.errors import UserError


def settle(bank: PairBank, round: int) -> str | None:
    """Bring the manifest level with parts rewritten before a kill; say what is wrong if any is.

    A part that is not the manifest's, yet has the manifest's samples and says itself that it is
    whole, was rewritten (references, rewards) and the manifest was not reached.

    Returns:
        None, or which part is missing or damaged. Never writes in that case.
    """
    manifest = restore_manifest(bank, round)
    if manifest is None:
        return None
    found = {}
    for number, known in manifest.items():
        try:
            found[number] = bank.verify(round, number)
        except UserError:
            try:
                bank.read_part(round, number)  # against the manifest: this error says what to do
            except UserError as error:
                return str(error)
            raise
        if found[number].samples != known.samples:
            return f"part {number} under {bank.root} has other samples than its manifest says."
    if found != manifest:
        bank.finish_round(round, found.values())
    return None


def restore_manifest(bank: PairBank, round: int) -> Manifest | None:
    """The round's manifest; one that is damaged or gone is made again if all its parts are there.

    Without a part of the plan it stays as it is, and there is none.
    """
    with contextlib.suppress(UserError):
        manifest = bank.manifest(round)
        if manifest is not None:
            return manifest
    plan = bank.plan(round)
    if plan and bank.done_parts(round) == list(range(len(plan))):
        return bank.finish_round(round)
    return None


def bring_up_to_date(bank: PairBank, round: int) -> None:
    """Rewrite the files of a round that 0.1.0 wrote, and finish it if all of them are there.

    For one process. An old file goes when the new one is on disk, so a kill at any instant loses
    nothing. A damaged one is left as it is: it counts as absent.
    """
    folder = bank.root / f"round_{round:04d}"
    old = sorted(folder.glob("chunk_[0-9]*.parquet"))
    if not old:
        return
    for path in old:
        number = int(path.stem.removeprefix("chunk_"))
        try:
            # Of an old and a new file of the same number, the new one is read.
            pairs = bank.read_part(round, number)
        except UserError:
            continue
        if not (folder / f"part_{number:05d}.parquet").exists():
            bank.write_part(round, number, pairs)
        path.unlink()
    done = bank.done_parts(round)
    expected = _expected_rows(folder)
    if done != list(range(len(done))) or not done:
        return  # a gap: what is missing is to be sampled, or it is an error; the caller knows
    if expected is None or expected == len(bank.read_round(round)):
        bank.finish_round(round)


def _expected_rows(folder: Path) -> int | None:
    """How many pairs the round was finished with: its last file may have been deleted since."""
    try:
        return int(json.loads((folder / "summary.json").read_text())["generation"]["samples"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
