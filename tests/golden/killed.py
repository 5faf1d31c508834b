"""Leave run folders as a kill leaves them: ``python -m tests.golden.killed --out FOLDER``.

Each run is the ordinary command in a process of its own, ended by SIGKILL once its folder shows
that it is where the kill is wanted. What it left is packed with its model, data and recipe (whose
paths are relative, so that it resumes wherever it is unpacked), and with what the same run does
when nobody kills it. ``test_old_run_folders.py`` resumes them with the code of today.

``--product`` names another checkout whose code is run, for the folders of a release.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.dist.pool import ROOT
from tests.golden.inputs import write_data, write_model
from tests.golden.ranks import environment
from tests.golden.record import describe_source
from tests.golden.trajectory import read_trajectory

TIMEOUT = 300.0  # seconds until a run must be where it is to be killed
RUN = "run"

BASE: dict[str, Any] = {
    "model": {"hf": "llama"},
    "data": {"train": "train.jsonl", "max_prompt_length": 96, "max_response_length": 32},
    "generation": {"max_new_tokens": 12, "chunk_size": 3},
    "train": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
    "evaluation": {"interval": "never"},
    "checkpoint": {"interval": 2, "keep": 1},
    "logging": {"tensorboard": False},
    "precision": "fp32",
    "seed": 5,
    "output_dir": RUN,
}


@dataclass(frozen=True)
class Kill:
    """A run and the moment it is killed.

    Attributes:
        sections: What differs from ``BASE``.
        is_due: Looks at the run folder; true from the wanted moment on.
        missed: True where the run got too far; then it is tried again.
    """

    sections: dict[str, Any]
    is_due: Callable[[Path], bool]
    missed: Callable[[Path], bool]


def steps_done(folder: Path) -> int:
    """Optimizer steps that the metrics tell of."""
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def saved_step(folder: Path) -> int:
    """The newest checkpoint's step, 0 before the first."""
    names = [p.name for p in (folder / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def sampled_files(folder: Path, round_index: int) -> int:
    """Files of samples that a round has, 0 once its summary is written too."""
    place = folder / "pairs" / f"round_{round_index:04d}"
    return 0 if (place / "summary.json").exists() else len(list(place.glob("*.parquet")))


# In the two first the newest checkpoint is of a step in the round, and a step after it is done:
# the resumed run has to do that one again.
KILLS = {
    "irft_in_steps": Kill(
        {"algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 8, "beta": [0.1, 0.2],
                       "prompts_per_round": 10}},
        is_due=lambda folder: saved_step(folder) >= 10 and steps_done(folder) > saved_step(folder),
        missed=lambda folder: not 10 <= saved_step(folder) < steps_done(folder) < 16,
    ),
    "rft_in_policy_steps": Kill(
        {"algorithm": {"name": "rft", "rounds": 2, "reward_steps": 3, "policy_steps": 7,
                       "beta": 0.05, "nll_coefficient": 0.1},
         "policy": {"samples_per_prompt": 2},
         "reward": {"lr": 1e-2, "mix_rounds": 1, "preferences": "preferences.jsonl"}},
        is_due=lambda folder: saved_step(folder) >= 14 and steps_done(folder) > saved_step(folder),
        missed=lambda folder: not 14 <= saved_step(folder) < steps_done(folder) < 20,
    ),
    "irft_in_generation": Kill(
        {"algorithm": {"name": "irft", "rounds": 2, "steps_per_round": 3, "beta": 0.1,
                       "reference": "initial", "prompts_per_round": 12},
         "generation": {"max_new_tokens": 24, "chunk_size": 1}},
        is_due=lambda folder: sampled_files(folder, 1) >= 4,
        missed=lambda folder: not 4 <= sampled_files(folder, 1) < 12,
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pack run folders of killed runs.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--product", type=Path, default=ROOT, help="checkout whose code is run")
    options = parser.parse_args(argv)
    source = describe_source(options.product)
    if source["dirty"]:
        sys.stderr.write("The tree is dirty; commit first, so that the folders can name what "
                         "wrote them:\n  " + "\n  ".join(source["dirty"]) + "\n")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name, kill in KILLS.items():
        with tempfile.TemporaryDirectory() as scratch:
            leave(Path(scratch) / name, kill, options.product.resolve(), source["commit"])
            pack(Path(scratch) / name, options.out / f"{name}.tar.xz")
    return 0


def leave(folder: Path, kill: Kill, product: Path, commit: str) -> None:
    """Make ``folder`` hold inputs, recipe, the killed run, and what the run does unkilled."""
    whole = folder.with_name("whole")
    for place in (folder, whole):
        write_run_inputs(place, kill)
    for _ in range(5):
        start(folder, product, kill)
        if not kill.missed(folder / RUN):
            break
        shutil.rmtree(folder / RUN)
    else:
        raise RuntimeError(f"{folder.name} was never caught where it is to be killed")
    assert not (folder / RUN / "hf").exists()
    start(whole, product)
    expected = {
        "commit": commit, "environment": environment() | {"threads": 1},  # as ``start`` gives it
        "steps_saved": saved_step(folder / RUN), "steps_done": steps_done(folder / RUN),
        "trajectory": read_trajectory(whole / RUN),
    }
    (folder / "expected.json").write_text(json.dumps(expected))


def write_run_inputs(folder: Path, kill: Kill) -> None:
    """The starting model, the data and the recipe of a run."""
    folder.mkdir()
    write_model(folder / "llama", "llama", tied=True)
    write_data(folder)
    mapping = BASE | {k: BASE.get(k, {}) | v for k, v in kill.sections.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(mapping))


def start(folder: Path, product: Path, kill: Kill | None = None) -> None:
    """Run the recipe of ``folder`` to its end, or until it is killed."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": str(product), "OMP_NUM_THREADS": "1", "MEGATRON_IRL_PLATFORM": "cpu",
    }
    command = [sys.executable, "-m", "megatron_irl", "train", "recipe.yaml"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stderr=errors, start_new_session=True
        )
        deadline, was_killed = time.monotonic() + TIMEOUT, False
        try:
            while process.poll() is None and time.monotonic() < deadline:
                was_killed = kill is not None and kill.is_due(folder / RUN)
                if was_killed:
                    break
                time.sleep(0.001)
        finally:  # with what it started: a checkpoint's writer would go on by itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not was_killed and process.returncode:
            errors.seek(0)
            raise RuntimeError(f"code {process.returncode}: {errors.read().decode()}")


def pack(folder: Path, archive: Path) -> None:
    """Write a ``.tar.xz`` of a folder, under the folder's name, that names no user."""
    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(archive, "w:xz", preset=9) as file:
        file.add(folder, folder.name, filter=anonymous)


if __name__ == "__main__":
    sys.exit(main())
