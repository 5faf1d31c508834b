"""``filter``: the demonstrations that a run's reward thinks well of, as a file to train on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_irl.data.demonstrations import conversation
from megatron_irl.data.ledger import (
    LedgerRow,
    complete_rounds,
    ledger_rounds,
    read_ledger,
    record_digest,
)
from megatron_irl.data.records import collect
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_jsonl_atomically


def filter_demonstrations(
    run: Path,
    out: Path,
    *,
    min_reward: float | None = None,
    top_quantile: float | None = None,
    round: int | None = None,
) -> str:
    """Write the records of ``data.train`` whose ledger reward is high enough, in their order.

    Args:
        run: Run folder with a demonstration ledger.
        out: JSONL file to write; the records are as in the run's files, other fields included.
        min_reward: Keep rewards of at least this.
        top_quantile: Keep the best share, in (0, 1], rounded up; records that tie with the last
            one kept are kept too. Exactly one of the two.
        round: Of the ledger; None: the newest. It must have every demonstration.

    Returns:
        One line for the user.

    Raises:
        UserError: No ledger, or one of some demonstrations only; both thresholds or none, nothing
            that reaches the threshold, files that have changed since the run or cannot be found,
            an ``out`` that cannot be used.
    """
    _check_options(run, out, min_reward, top_quantile)
    rounds = ledger_rounds(run / "ledger")
    if not rounds:
        raise UserError(f"{run} has no demonstration ledger. Runs with algorithm.name=rft write "
                        "one, each round after its reward steps.")
    rows = read_ledger(run / "ledger", round)
    chosen = rounds[-1] if round is None else round
    _check_complete(run, chosen, len(rows))
    rewards = sorted((row.reward for row in rows), reverse=True)
    if top_quantile is not None:
        threshold = rewards[math.ceil(top_quantile * len(rows)) - 1]
    else:
        assert min_reward is not None
        threshold = min_reward
    records = _unchanged_records(rows, out)
    kept = [records[row.source] for row in rows if row.reward >= threshold]
    where = f"round {chosen}"
    if not kept:
        raise UserError(f"--min-reward {min_reward} leaves no demonstration; the highest reward in "
                        f"{where} is {rewards[0]:.6g}. Set it lower, or use --top-quantile.")
    write_jsonl_atomically(out, kept)
    return (f"kept {len(kept)} of {len(rows)} demonstrations, those with a reward of at least "
            f"{threshold:.6g} in {where}: {out}")


def _check_options(
    run: Path, out: Path, min_reward: float | None, top_quantile: float | None
) -> None:
    if not (run / "recipe.yaml").exists():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml.")
    if (min_reward is None) == (top_quantile is None):
        given = "neither is given" if min_reward is None else "both are given"
        raise UserError(f"--min-reward and --top-quantile: {given}. Give exactly one.")
    if min_reward is not None and not math.isfinite(min_reward):
        raise UserError(f"--min-reward {min_reward} is not a finite number.")
    if top_quantile is not None and not 0 < top_quantile <= 1:
        raise UserError(f"--top-quantile {top_quantile} must be above 0 and at most 1; 0.25 keeps "
                        "the best quarter.")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out} must end with .jsonl, the form it is written in.")


def _check_complete(run: Path, round: int, num_rows: int) -> None:
    complete = complete_rounds(run / "ledger")
    if round in complete:
        return
    remedy = (f"Rounds that have all: {', '.join(map(str, complete))}; set --round to one."
              if complete else
              "Start `megatron-irl train` on the run again to finish it, or set "
              "reward.ledger=every_round for a new run.")
    raise UserError(f"round {round} of {run} has the rewards of the {num_rows} demonstrations that "
                    "it sampled for and not of the others, which with reward.ledger=last are "
                    f"scored in the last round only. {remedy}")


def _unchanged_records(rows: Sequence[LedgerRow], out: Path) -> dict[str, dict[str, Any]]:
    """The records by ``file:line``, as the files are now, if they still say what was scored."""
    paths = [Path(p) for p in dict.fromkeys(row.source.rpartition(":")[0] for row in rows)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)} of the run's data.train cannot be found from the "
                        f"working directory {Path.cwd()}. Start the command where the run was "
                        "started, or put the files back.")
    if out.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--out {out} is a file of the run's data.train. Choose another one.")

    def build(record: dict[str, Any], source: str) -> tuple[str, str, dict[str, Any]]:
        return source, record_digest(*conversation(record)), record

    now = {source: (found, record) for source, found, record in collect(paths, build)}
    changed = [row.source for row in rows if now.get(row.source, ("", {}))[0] != row.digest]
    if changed:
        raise UserError(f"{changed[0]} is not the record that the run scored ({len(changed)} of "
                        f"{len(rows)} differ): the file has changed since. Put the run's version "
                        "back, or run it again.")
    return {source: record for source, (_, record) in now.items()}
