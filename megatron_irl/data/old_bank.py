"""Rounds that release 0.1.0 wrote: chunks instead of parts, no digests, no manifest.

They are brought into today's form by the run that resumes them; everybody else reads them as they
are (see ``pair_file``). To be removed with the support for run folders of 0.1.0.
"""

import json
from pathlib import Path

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.errors import UserError


def bring_up_to_date(bank: PairBank, round: int) -> None:
    """Rewrite the chunks of a round as parts, and finish it if all of them are there.

    For one process. A chunk goes when its part is on disk, so a kill at any instant loses nothing.
    A damaged chunk is left as it is: it counts as absent.
    """
    folder = bank.root / f"round_{round:04d}"
    chunks = sorted(folder.glob("chunk_[0-9]*.parquet"))
    if not chunks:
        return
    for path in chunks:
        number = int(path.stem.removeprefix("chunk_"))
        try:
            # Of a part and a chunk of the same number, the part is read.
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
    """How many pairs the round was finished with: its last chunk may have been deleted since."""
    try:
        return int(json.loads((folder / "summary.json").read_text())["generation"]["samples"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
