"""How long a recipe's records are, without reading more than the first of them."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_irl.config import Recipe
from megatron_irl.config.files import paths_of
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.sources import training_reading
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.planning.workload import Lengths
from megatron_irl.types import Demonstration

SMALL = 8 * 2**20  # bytes of data that are read whole, as training does
FIRST = 256  # records of larger ones that are encoded
_HEAD = 4 * 2**20  # bytes that records are counted in


def is_small(recipe: Recipe) -> bool:
    """Whether all of ``data.train`` can be read in a moment."""
    paths = [Path(path) for path in paths_of(recipe.data.train)]
    return all(path.is_file() for path in paths) and sum(p.stat().st_size for p in paths) <= SMALL


def lengths_of(demonstrations: Sequence[Demonstration]) -> Lengths:
    """Of records that were read; samples are taken to be as long as demonstrations."""
    prompt = np.array([len(d.prompt_ids) for d in demonstrations])
    response = np.array([len(d.response_ids) for d in demonstrations])
    return Lengths(prompt, response, response, len(demonstrations),
                   f"{len(demonstrations)} records, {_mean(prompt, response)}")


def sample_lengths(recipe: Recipe, tokenizer: Tokenizer) -> Lengths:
    """Of the first records, and how many there are about.

    Raises:
        UserError: One of them is bad.
    """
    first, _ = load_demonstrations(
        training_reading(recipe.data, []), tokenizer, limit=FIRST, turns=recipe.data.turns,
        max_prompt_length=recipe.data.max_prompt_length, overlong=recipe.data.overlong,
        max_response_length=recipe.data.max_response_length,
    )
    found, records = lengths_of(first), count_records(paths_of(recipe.data.train))
    origin = (f"about {records:,} records; of the first {len(first)} "
              f"{_mean(found.prompt, found.response)}")
    return Lengths(found.prompt, found.response, found.sample, max(records, len(first)), origin)


def count_records(paths: Sequence[str]) -> int:
    """About how many records files have: by their size and how long the first lines are."""
    total = 0
    for name in paths:
        path = Path(name)
        files = [p for p in path.rglob("*.arrow")] if path.is_dir() else [path]
        total += sum(_count(file) for file in files)
    return total


def _count(path: Path) -> int:
    size = path.stat().st_size
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            head = file.read(_HEAD)
        size *= 4  # about what text is compressed to
    else:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    lines = head.count(b"\n")
    if path.suffix == ".json" or not lines:
        lines = max(1, head.count(b'{"') + head.count(b'{ "'))
    return max(1, round(lines * max(size, len(head)) / max(1, len(head))))


def _mean(prompt: np.ndarray, response: np.ndarray) -> str:
    return f"mean prompt {prompt.mean():.0f} and response {response.mean():.0f} tokens"
