"""The faults of release 0.1.0, played through the real command on any version of the code.

    python -m tests.golden.first_faults [--code CHECKOUT] [--only 8]

Nothing of the package is imported: ``--code`` (default: this checkout) is what the commands run.
Prints one line per fault, ``right`` or what happened; the exit code is 1 if anything was wrong. The
suite has a finer test for each (docs/architecture.md lists them); this says that they bite on the
code before, whose modules had other names.
"""

import argparse
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.faults.cases import write_inputs

SECONDS = 240.0  # for one command
STEPS_PER_ROUND = 20
INSIDE = STEPS_PER_ROUND + 2  # a step in the middle of the second round
FAULTS: dict[str, Callable[["Scene"], str]] = {}


def fault(name: str) -> Callable[[Callable[["Scene"], str]], Callable[["Scene"], str]]:
    """Register a scene under a name; it returns what was wrong, "" for nothing."""
    def register(play: Callable[["Scene"], str]) -> Callable[["Scene"], str]:
        FAULTS[name] = play
        return play
    return register


class Scene:
    """The code that is tried, and a folder with inputs, a recipe and a run that was killed."""

    def __init__(self, code: Path, root: Path) -> None:
        self.code, self.root = code, root
        self._played = 0
        write_inputs(root)
        mapping = {
            "model": {"hf": str(root / "model")},
            "data": {"train": str(root / "train.jsonl"), "max_prompt_length": 48,
                     "max_response_length": 8},
            "algorithm": {"name": "irft", "rounds": 2, "steps_per_round": STEPS_PER_ROUND,
                          "prompts_per_round": 24},
            "generation": {"max_new_tokens": 6, "chunk_size": 6},
            "train": {"micro_batch_size": 2, "global_batch_size": 4},
            "checkpoint": {"interval": 1}, "logging": {"tensorboard": False},
            "evaluation": {"interval": "never"}, "optimizer": {"lr": 1e-3},
            "precision": "fp32", "seed": 3, "output_dir": "run",
        }
        (root / "recipe.yaml").write_text(yaml.safe_dump(mapping))

    def folder(self, *, killed: bool = False) -> Path:
        """A new working directory, whose ``run`` is the killed one's copy if asked for."""
        self._played += 1
        folder = self.root / f"scene_{self._played}"
        folder.mkdir()
        if killed:
            shutil.copytree(self.killed, folder / "run")
        return folder

    def start(self, folder: Path, *words: str, ranks: tuple[int, int, int] | None = None
              ) -> subprocess.Popen[str]:
        """``megatron-irl train`` in ``folder``; ``ranks``: (rank, of how many, port)."""
        environment = self.environment()
        if ranks is not None:
            rank, count, port = map(str, ranks)
            environment |= {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": count,
                            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port}
        command = [sys.executable, "-m", "megatron_irl", "train", str(self.root / "recipe.yaml")]
        return subprocess.Popen([*command, *words], cwd=folder, env=environment, text=True,
                                stderr=subprocess.PIPE, start_new_session=True)

    def train(self, folder: Path, *words: str) -> tuple[int, str]:
        """The exit code of a start and what it said."""
        return end(self.start(folder, *words))

    def two_ranks(self, folders: list[Path], *words: str) -> list[tuple[int, str]]:
        """Two ranks as a launcher of two hosts starts them, each in a working directory."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [self.start(folder, "parallel.data_parallel_size=2", *words, ranks=(rank, 2, port))
                for rank, folder in enumerate(folders)]
        return [end(process) for process in both]

    def python(self, text: str) -> str:
        """What a program says on standard error."""
        return subprocess.run([sys.executable, "-c", text], env=self.environment(), text=True,
                              capture_output=True, check=False).stderr

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1",
                             "CUDA_VISIBLE_DEVICES": ""}

    @functools.cached_property
    def killed(self) -> Path:
        """A run folder that SIGKILL left in the middle of its second round."""
        folder = self.folder()
        process, deadline = self.start(folder), time.monotonic() + SECONDS
        saved = folder / "run" / "checkpoints"
        while not any(int(p.name[5:]) >= INSIDE for p in saved.glob("step_*")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run did not come to step {INSIDE}: {end(process)[1]}")
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return folder / "run"


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a start; one that hangs is killed and has the code -9."""
    try:
        _, said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
    return process.returncode, said


def refusal(answer: tuple[int, str], *named: str) -> str:
    """"" if a start was refused with code 2 and a message that has all the words."""
    code, said = answer
    if code == 2 and "Traceback" not in said and all(word in said for word in named):
        return ""
    trace = ", traceback" if "Traceback" in said else ""
    return f"code {code}{trace}: {(said.strip().splitlines() or ['nothing said'])[-1][:120]}"


@fault("5: the last part of a round in its steps is deleted")
def deleted_part(scene: Scene) -> str:
    folder = scene.folder(killed=True)
    last = max((folder / "run/pairs/round_0001").glob("*.parquet"))
    last.unlink()
    return refusal(scene.train(folder), last.name)


@fault("5: two ranks do not see one output folder")
def not_shared(scene: Scene) -> str:
    answers = scene.two_ranks([scene.folder(), scene.folder()])
    return " | ".join(filter(None, (refusal(answer) for answer in answers)))


@fault("6: two starts on one folder at once")
def two_starts(scene: Scene) -> str:
    folder = scene.folder()
    both = [scene.start(folder) for _ in range(2)]
    answers = [end(process) for process in both]
    codes = sorted(code for code, _ in answers)
    lines = len((folder / "run/metrics.jsonl").read_text().splitlines())
    if codes == [0, 2] and lines == 2 * STEPS_PER_ROUND:
        return refusal(next(a for a in answers if a[0] == 2), "in use by process")
    return f"codes {codes}, {lines} lines for {2 * STEPS_PER_ROUND} steps"


@fault("7: the main rank cannot write its log, the other waits for it")
def one_rank_fails(scene: Scene) -> str:
    folder = scene.folder(killed=True)
    (folder / "run/metrics.jsonl").unlink()
    (folder / "run/metrics.jsonl").mkdir()
    answers = scene.two_ranks([folder, folder])
    return " | ".join(filter(None, (refusal(answer) for answer in answers)))


@fault("7: the time limit of collectives is a key")
def time_limit(scene: Scene) -> str:
    code, said = scene.train(scene.folder(), "parallel.timeout_minutes=5",
                             "algorithm.rounds=1", "algorithm.steps_per_round=1")
    return "" if code == 0 else refusal((code, said), "there is no such word")


@fault("8: the report cannot be written")
def report(scene: Scene) -> str:
    folder = scene.folder(killed=True)
    page = folder / "run/report.html"
    page.unlink(missing_ok=True)
    page.mkdir()
    code, said = scene.train(folder)
    saved = sorted(p.name for p in (folder / "run/checkpoints").glob("step_*"))[-1]
    return "" if code == 0 else f"{refusal((code, said), 'no such word')}; newest {saved}"


@fault("8: a run that was begun before a key existed")
def new_key(scene: Scene) -> str:
    folder = scene.folder(killed=True)
    written = yaml.safe_load((folder / "run/recipe.yaml").read_text())
    del written["schedule"]["min_lr_ratio"]
    (folder / "run/recipe.yaml").write_text(yaml.safe_dump(written))
    identity = json.loads((folder / "run/run.json").read_text())
    identity["fingerprint"] = "of a version without the key"
    (folder / "run/run.json").write_text(json.dumps(identity))
    code, said = scene.train(folder)
    return "" if code == 0 else refusal((code, said), "no such word")


@fault("10: Megatron's word that ranks' states differ is heard")
def heard(scene: Scene) -> str:
    room = next(n for n in ("hardware", "platform") if (scene.code / "megatron_irl" / n).is_dir())
    said = scene.python(
        f"import logging, megatron_irl.{room}\n"
        "logging.getLogger('megatron.core.dist_checkpointing.validation').warning("
        "'Rank 1 common state dict differs from rank 0 common state dict.')")
    return "" if "Rank 1 common" in said else "silenced"


@fault("10: a checkpoint's metadata that runs something")
def pickled(scene: Scene) -> str:
    folder = scene.folder()
    (folder / ".metadata").write_bytes(pickle.dumps(_MakesAFolder(folder / "it ran")))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    subprocess.run(
        [sys.executable, scene.code / "tools/convert_megatron_to_hf.py", "--checkpoint", folder,
         "--out", folder / "out"], env=scene.environment(), capture_output=True, check=False)
    return "it ran" if (folder / "it ran").exists() else ""


class _MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@fault("10: make clean leaves runs/ alone")
def clean(scene: Scene) -> str:
    words = subprocess.run(["make", "--dry-run", "clean"], cwd=scene.code, text=True,
                           capture_output=True, check=True).stdout.split()
    return "removes runs/" if "runs" in words else ""


@fault("10: continuous integration runs pyright")
def integration(scene: Scene) -> str:
    return "" if "pyright" in (scene.code / ".ci/run").read_text() else "it does not"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--code", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--only", default="", help="faults whose name begins so")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="first_faults_") as name:
        scene = Scene(options.code.resolve(), Path(name))
        faults = {n: play for n, play in FAULTS.items() if n.startswith(options.only)}
        for fault_name, play in faults.items():
            wrong = play(scene)
            bad += bool(wrong)
            sys.stdout.write(f"{fault_name}: {wrong or 'right'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(faults) - bad} of {len(faults)} right\n")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
