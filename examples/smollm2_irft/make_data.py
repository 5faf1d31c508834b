"""Write demonstrations of a small task with an exact answer: sort three or four numbers.

    python examples/smollm2_irft/make_data.py --out data/number_sorting

Items come from the ``number_sorting`` generator of reasoning-gym (Apache-2.0), which also judges
every demonstration before it is written. ``--out`` gets ``train.jsonl`` and ``eval.jsonl``; the
same arguments give the same files.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# One worked turn, so that the untrained model knows the form of an answer and can sometimes do it.
SHOWN = [
    {"role": "system", "content": "Sort the numbers."},
    {"role": "user", "content": "31, 7, 52"},
    {"role": "assistant", "content": "7, 31, 52"},
]
MIN_NUMBERS, MAX_NUMBERS, MAX_VALUE = 3, 4, 99


def build_record(numbers: list[int]) -> dict[str, Any]:
    """Return one demonstration; the response is the answer, so exact match is well defined."""
    answer = _listed(sorted(numbers))
    messages = [
        *SHOWN,
        {"role": "user", "content": _listed(numbers)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "answer": answer}


def build_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` demonstrations, no two about the same numbers in whatever order.

    So a held-out answer is never a training answer.
    """
    import reasoning_gym

    # Spare items stand in for the repeated ones, which are rare, and for the descending half.
    size = 3 * count + 100
    dataset = reasoning_gym.create_dataset(
        "number_sorting", size=size, seed=seed, min_numbers=MIN_NUMBERS, max_numbers=MAX_NUMBERS,
        min_decimals=0, max_decimals=0, min_value=0, max_value=MAX_VALUE,
    )
    records: dict[str, dict[str, Any]] = {}
    for item in dataset:
        if item["metadata"]["direction"] != "ascending":
            continue
        numbers = [int(float(number)) for number in item["metadata"]["original_numbers"]]
        record = build_record(numbers)
        judged = str([f"{number}.0" for number in record["answer"].split(", ")])
        if dataset.score_answer(judged, item) != 1.0:
            raise RuntimeError(f"reasoning-gym refuses the answer {judged} to {numbers}")
        records.setdefault(record["answer"], record)
        if len(records) == count:
            return list(records.values())
    raise RuntimeError(f"{len(records)} distinct items among {size}; asked for {count}")


def check_disjoint(train: Iterable[dict[str, Any]], heldout: Iterable[dict[str, Any]]) -> None:
    """Stop if some set of numbers is in both, in any order."""
    shared = {r["answer"] for r in train} & {r["answer"] for r in heldout}
    if shared:
        raise RuntimeError(f"{len(shared)} items are in train and eval, such as {min(shared)}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=128, help="training demonstrations")
    parser.add_argument("--eval", type=int, default=100, help="held-out demonstrations")
    parser.add_argument("--seed", type=int, default=2889)
    args = parser.parse_args(argv)
    if min(args.train, args.eval) < 1:
        parser.error(f"--train={args.train} --eval={args.eval}: each must be 1 or more")

    # Held-out items first: they stay the same when --train changes.
    records = build_records(args.eval + args.train, args.seed)
    heldout, train = records[:args.eval], records[args.eval:]
    check_disjoint(train, heldout)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", train)
    write(args.out / "eval.jsonl", heldout)
    print(f"{args.out}: {len(train)} demonstrations to train on, {len(heldout)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
