"""Files that ``generate`` and ``score`` read and write."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.config.files import files_of
from megatron_irl.console import Console
from megatron_irl.data.forms import check_field_name
from megatron_irl.data.prompts import PromptRecord, ScoreRecord
from megatron_irl.data.sources import Reading
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_jsonl_atomically
from megatron_irl.storage.tables import write_parquet_of_lines


def reading_of(options: argparse.Namespace, flag: str, path: Path) -> Reading:
    """How an input file is read: with ``--format`` and ``--field``.

    Raises:
        UserError: No such file, or a mapping that is none.
    """
    fields = {}
    for each in options.field or ():
        ours, equals, theirs = each.partition("=")
        if not (equals and ours and theirs):
            raise UserError(f"--field {each} is not OURS=THEIRS, as in --field prompt=question.")
        check_field_name(ours)
        fields[ours] = theirs
    return Reading(tuple(files_of(flag, str(path))), options.format, fields)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError unless the output can be written without losing another."""
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: give a file in a writable folder.")
    if out.is_file() and not overwrite:
        raise UserError(f"--out {out} exists already. Give --overwrite to replace it, or another "
                        "file.")
    sys.stderr.flush()


def check_one_kind(out: Path, records: Sequence[PromptRecord]) -> None:
    """Raise UserError if a Parquet file could not hold the prompts as they are."""
    if out.suffix == ".parquet" and len({type(record.prompt) for record in records}) > 1:
        raise UserError(f"--out {out}: some prompts are strings and some are messages; a column of "
                        "Parquet holds one kind. Write to a .jsonl file.")


def write_records(out: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, or Parquet where the name ends so; the file appears whole or not at all."""
    if out.suffix != ".parquet":
        write_jsonl_atomically(out, records)
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        write_jsonl_atomically(lines, records)
        write_parquet_of_lines(lines, out)


def say_what_was_read(
    progress: Console, reading: Reading, tokenizer: Tokenizer,
    records: Sequence[PromptRecord] | Sequence[ScoreRecord],
) -> None:
    """Tell the user what was recognised, and of prompts that miss the chat template."""
    for note in reading.notes:
        progress.note(note)
    plain = sum(isinstance(record.prompt, str) for record in records)
    if plain and tokenizer.chat_template is not None:
        progress.note(f"{plain} of {len(records)} prompts are strings and are taken as they are, "
                      "past the model's chat template. Write "
                      '{"messages": [{"role": "user", "content": ...}]} to use it.')
