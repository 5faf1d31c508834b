"""Keys of release 0.1.0 are read under their names of then, and mean what they meant."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_irl.config import load_recipe, to_yaml
from megatron_irl.config.fingerprint import fingerprint
from megatron_irl.errors import UserError

PACKAGE = Path(__file__).parents[3] / "megatron_irl"
RECIPE = {
    "model": {"hf": "m"}, "data": {"train": "t.jsonl"}, "output_dir": "o",
    "algorithm": {"name": "irft", "steps_per_round": 1},
}


def load(path: Path, sections, *overrides):
    path.write_text(yaml.safe_dump(RECIPE | sections))
    return load_recipe(path, overrides, check_files=False)


def test_old_names_are_read_and_new_ones_written(tmp_path):
    path = tmp_path / "r.yaml"
    old = load(path, {"generation": {"chunk_size": 7}, "train": {"logprob_chunk_size": 9}})
    new = load(path, {"generation": {"part_size": 7}, "train": {"logprob_rows": 9}})
    assert old == new and (old.generation.part_size, old.train.logprob_rows) == (7, 9)
    assert old == load(path, {}, "generation.chunk_size=7", "train.logprob_chunk_size=9")
    assert old == load(path, {"generation": {"part_size": 1}, "train": {"logprob_rows": 9}},
                       "generation.chunk_size=7")
    assert "chunk" not in to_yaml(old)


def test_the_name_of_a_run_does_not_depend_on_it(tmp_path):
    """Recorded from the version before the keys were renamed."""
    path = tmp_path / "r.yaml"
    assert fingerprint(load(path, {"generation": {"chunk_size": 7}})) == "246cce47a3293392"


def test_both_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"generation.chunk_size and generation.part_size are one"):
        load(tmp_path / "r.yaml", {"generation": {"chunk_size": 7, "part_size": 7}})


def test_a_chunk_is_a_model_chunk():
    """Names that make it something else: upstream's arguments, and files of release 0.1.0."""
    allowed = {
        "compat/cpu_updates.py": {"chunk_size"},  # apex's argument
        "generation/context.py": {"chunk_length"}, "generation/decode.py": set(),
        "generation/megatron_engine.py": set(),
        "config/renamed.py": {"chunk_size", "logprob_chunk_size"},
        "data/pair_bank.py": {"chunk_"}, "data/bank_repair.py": {"chunk_"},  # names of files
    }
    found = {}
    for path in PACKAGE.rglob("*.py"):
        names = set(re.findall(r"\b\w*chunk_(?:size|seed)\b|\bchunk_\w*", path.read_text()))
        if names - allowed.get(str(path.relative_to(PACKAGE)), set()):
            found[path.name] = names
    assert not found
