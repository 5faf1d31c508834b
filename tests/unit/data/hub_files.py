"""Files as they lie on the hub: the shapes of well-known data sets, with content of our own."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Turns = list[tuple[str, str]]
SUMS = [(3, 4), (10, 5), (8, 9)]
ASKED = [f"What is {a} and {b} together?" for a, b in SUMS]
SAID = [f"That makes {a + b}." for a, b in SUMS]
AGAIN, STILL = "Are you sure?", "Quite sure."
SYSTEM = "You add numbers."


def _lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def _one_turn() -> list[Turns]:
    return [[("user", q), ("assistant", a)] for q, a in zip(ASKED, SAID, strict=True)]


def _two_turns() -> list[Turns]:
    return [[*turns, ("user", AGAIN), ("assistant", STILL)] for turns in _one_turn()]


def alpaca(folder: Path) -> tuple[Path, list[Turns]]:
    """A JSON array, printed over several lines; an input that may be empty."""
    records = [{"instruction": q, "input": "", "output": a}
               for q, a in zip(ASKED, SAID, strict=True)]
    records[1] |= {"instruction": "Add the numbers.", "input": "10, 5"}
    path = folder / "alpaca_data.json"
    path.write_text(json.dumps(records, indent=4))
    expected = _one_turn()
    expected[1][0] = ("user", "Add the numbers.\n\n10, 5")
    return path, expected


def sharegpt(folder: Path) -> tuple[Path, list[Turns]]:
    records = [{"id": f"x_{i}", "conversations": [
        {"from": "human" if role == "user" else "gpt", "value": text} for role, text in turns]}
        for i, turns in enumerate(_two_turns())]
    path = folder / "sharegpt.json"
    path.write_text(json.dumps(records))
    return path, _two_turns()


def ultrachat(folder: Path) -> tuple[Path, list[Turns]]:
    """Parquet with a prompt beside the messages that repeats their first."""
    records = [{"prompt": turns[0][1], "prompt_id": f"{i:08x}", "messages": [
        {"content": text, "role": role} for role, text in turns]}
        for i, turns in enumerate(_two_turns())]
    return _parquet(folder / "train_sft-00000-of-00001.parquet", records), _two_turns()


def openhermes(folder: Path) -> tuple[Path, list[Turns]]:
    """Many fields, nearly all of them null, and weights that are not for us."""
    records = []
    for i, turns in enumerate(_one_turn()):
        system = [{"from": "system", "value": SYSTEM, "weight": None}] if i == 0 else []
        records.append({
            "custom_instruction": None, "topic": None, "model_name": None, "model": None,
            "skip_prompt_formatting": False, "category": "orca", "conversations": [
                *system, *({"from": "human" if role == "user" else "gpt", "value": text,
                            "weight": None} for role, text in turns)],
            "views": None, "language": None, "id": None, "title": None, "idx": None, "hash": None,
            "avatarUrl": None, "system_prompt": None, "source": "own"})
    path = folder / "openhermes.json"
    path.write_text(json.dumps(records))
    expected = _one_turn()
    expected[0].insert(0, ("system", SYSTEM))
    return path, expected


def hh_rlhf(folder: Path) -> tuple[Path, list[Turns]]:
    """Gzip lines; each side is the whole conversation as one text."""
    path = folder / "train.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for turns in _two_turns():
            before = "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {text}"
                             for role, text in turns[:-1])
            file.write(json.dumps({"chosen": f"{before}\n\nAssistant: {turns[-1][1]}",
                                   "rejected": f"{before}\n\nAssistant: No idea."}) + "\n")
    return path, _two_turns()


def gsm8k(folder: Path) -> tuple[Path, list[Turns]]:
    """An answer that ends with the number after four hashes."""
    answers = [f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}" for a, b in SUMS]
    records = [{"question": q, "answer": a} for q, a in zip(ASKED, answers, strict=True)]
    return _parquet(folder / "train-00000-of-00001.parquet", records), [
        [("user", q), ("assistant", a)] for q, a in zip(ASKED, answers, strict=True)]


def dolly(folder: Path) -> tuple[Path, list[Turns]]:
    records = [{"instruction": q, "context": "", "response": a, "category": "open_qa"}
               for q, a in zip(ASKED, SAID, strict=True)]
    records[2]["context"] = "Eight and nine are numbers."
    expected = _one_turn()
    expected[2][0] = ("user", f"{ASKED[2]}\n\nEight and nine are numbers.")
    return _lines(folder / "databricks-dolly-15k.jsonl", records), expected


def oasst(folder: Path) -> tuple[Path, list[Turns]]:
    """One message a row, trees mixed; ranked replies, a deleted one, a prompt left unanswered."""
    def row(id: str, parent: str | None, role: str, text: str, rank: float | None,
            deleted: bool = False) -> dict[str, Any]:
        return {"message_id": id, "parent_id": parent, "text": text, "role": role, "lang": "en",
                "rank": rank, "deleted": deleted, "message_tree_id": id[0],
                "review_result": None if parent is None else True}

    rows = [row("a", None, "prompter", ASKED[0], None), row("b", None, "prompter", ASKED[1], None),
            row("a1", "a", "assistant", "Eight, I guess.", 1.0),
            row("a2", "a", "assistant", SAID[0], 0.0),
            row("b0", "b", "assistant", "Nonsense.", 0.0, deleted=True),
            row("b1", "b", "assistant", SAID[1], 1.0),
            row("b2", "b", "assistant", "Around fifteen.", 2.0),
            row("a3", "a2", "prompter", AGAIN, None), row("a4", "a3", "assistant", STILL, None),
            row("b3", "b1", "prompter", AGAIN, None),  # no one replied
            row("c", None, "prompter", ASKED[2], None)]  # nor here
    return _parquet(folder / "train-00000-of-00001.parquet", rows), [
        _two_turns()[0], _one_turn()[1]]


def magpie(folder: Path) -> tuple[Path, list[Turns]]:
    """The first turn as fields of its own, and the conversation."""
    records = [{"uuid": f"{i}", "model": "m", "gen_input_configs": {"temperature": 1.0},
                "instruction": turns[0][1], "response": turns[1][1], "conversations": [
                    {"from": "human", "value": turns[0][1]}, {"from": "gpt", "value": turns[1][1]}],
                "task_category": "Math", "min_similar_uuid": None, "instruct_reward": -0.5}
               for i, turns in enumerate(_one_turn())]
    return _parquet(folder / "train-00000-of-00001.parquet", records), _one_turn()


def tool_use(folder: Path) -> tuple[Path, list[Turns]]:
    """Tools and calls as JSON in strings: the function-calling sets' way."""
    tools = [{"name": "add", "description": "Adds.", "parameters": {"x": {"type": "int"}}}]
    records = [{"id": i, "query": q, "tools": json.dumps(tools),
                "answers": json.dumps([{"name": "add", "arguments": {"x": a, "y": b}}])}
               for i, (q, (a, b)) in enumerate(zip(ASKED, SUMS, strict=True))]
    path = folder / "calls.json"
    path.write_text(json.dumps(records))
    return path, [[("user", q), ("assistant", "")] for q in ASKED]


FILES: list[Callable[[Path], tuple[Path, list[Turns]]]] = [
    alpaca, sharegpt, ultrachat, openhermes, hh_rlhf, gsm8k, dolly, oasst, magpie, tool_use]
