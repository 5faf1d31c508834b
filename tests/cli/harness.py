"""Runs of the real command in this process, over models and data small enough for seconds."""

import contextlib
import gc
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Before any redirection: a module of Megatron's takes the real standard error when imported.
import megatron_irl.run.loop  # noqa: F401

# What a step computes, as opposed to how long it took.
DETERMINISTIC = (
    "step", "round", "loss", "grad_norm", "lr", "reward/demo", "reward/sample", "reward/margin",
    "reward/accuracy", "logp/demo", "logp/sample", "length/demo", "length/sample", "tokens",
    "staleness",
)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    err: str


def run(*arguments: Any) -> Result:
    """Call the command line in this process; the process group is gone afterwards."""
    from megatron_irl.cli import main
    from megatron_irl.parallel.topology import shutdown

    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            code = main([str(a) for a in arguments])
    finally:
        shutdown()
        gc.collect()  # process groups in cycles, whose threads would wake up again and again
    return Result(code, err.getvalue())


def refused(*arguments: Any, named: tuple[str, ...] = ()) -> str:
    """Assert that a command ends with code 2 and one message that has every word of ``named``."""
    result = run(*arguments)
    said = [line for line in result.err.splitlines() if line.startswith("megatron-irl: ")]
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    message = result.err[result.err.rindex("megatron-irl: ") :]
    for word in named:
        assert word in message, f"{word!r} is not in {message!r}"
    assert said, result.err
    return message


def write_recipe(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def deterministic(folder: Path) -> list[dict[str, Any]]:
    """The metric lines of a run without clock readings."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [{k: line[k] for k in DETERMINISTIC if k in line} for line in lines]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's modification time and bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def edited_copy(model: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder with keys of its config.json changed."""
    shutil.copytree(model, to)
    written = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(written | config))
    return to
