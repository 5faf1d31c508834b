"""Write demonstrations of a small task with an exact answer: reverse a list of words.

    python examples/smollm2_irft/make_data.py --out data/word_reversal

Items come from the ``word_sequence_reversal`` generator of reasoning-gym (Apache-2.0), which also
judges every demonstration before it is written. ``--out`` gets ``train.jsonl`` and ``eval.jsonl``;
the same arguments give the same files.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUESTION = "Reverse the order of these words: "
# One worked turn, so that the untrained model knows the form of an answer and can sometimes do it.
SHOWN = [
    {"role": "system", "content": "Reply with the answer only."},
    {"role": "user", "content": QUESTION + "red, green, blue"},
    {"role": "assistant", "content": "blue, green, red"},
]
MIN_WORDS, MAX_WORDS = 3, 5


def build_record(words: list[str], answer: str) -> dict[str, Any]:
    """Return one demonstration; the response is the answer, so exact match is well defined."""
    messages = [
        *SHOWN,
        {"role": "user", "content": QUESTION + ", ".join(words)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "answer": answer}


def build_records(count: int, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` demonstrations, no two about the same words in whatever order.

    So a held-out prompt is never a training prompt, nor a training prompt read backwards.
    """
    import reasoning_gym

    # Spare items stand in for the repeated ones, which are rare.
    size = 2 * count + 100
    dataset = reasoning_gym.create_dataset("word_sequence_reversal", size=size, seed=seed,
                                           min_words=MIN_WORDS, max_words=MAX_WORDS)
    records: dict[tuple[str, ...], dict[str, Any]] = {}
    for item in dataset:
        words, answer = item["metadata"]["words"], item["answer"]
        if dataset.score_answer(answer, item) != 1.0:
            raise RuntimeError(f"reasoning-gym refuses its own answer {answer!r}")
        records.setdefault(_bag_of_words(words), build_record(words, answer))
        if len(records) == count:
            return list(records.values())
    raise RuntimeError(f"{len(records)} distinct items among {size}; asked for {count}")


def check_disjoint(train: Iterable[dict[str, Any]], heldout: Iterable[dict[str, Any]]) -> None:
    """Stop if some list of words is in both, in any order."""
    bags = [{_bag_of_words(record["answer"].split(", ")) for record in part}
            for part in (train, heldout)]
    shared = bags[0] & bags[1]
    if shared:
        raise RuntimeError(f"{len(shared)} items are in train and eval, such as {min(shared)}")


def _bag_of_words(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(words))


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=320, help="training demonstrations")
    parser.add_argument("--eval", type=int, default=200, help="held-out demonstrations")
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
