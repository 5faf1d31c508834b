"""What a run did, read from the files of its folder alone: numbers as they are, arrays as digests.

Nothing of the product is imported here: the record must be readable by, and comparable with, any
version of it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Trajectory = dict[str, Any]

# Clock readings, and what later versions may measure of the machine rather than of the run.
_OF_THE_MACHINE = ("time/", "train/", "memory/", "checkpoint/", "tokens_per_second")
_HEX_DIGITS = 32


def read_trajectory(folder: Path) -> Trajectory:
    """Read a finished run.

    Returns:
        ``steps``: one [round, loss, gradient norm] per optimizer step. ``metrics``: their other
        numbers, by key one digest over all steps. ``samples``: per round digests of token ids and
        of what is known of them, in prompt order. ``evaluation``: the numbers of every round's
        line. ``weights``: per exported folder a digest of names, types, shapes and bytes.
    """
    lines = _read_jsonl(folder / "metrics.jsonl")
    keys = sorted({key for line in lines for key in line} - {"step", "round", "loss", "grad_norm"})
    return {
        "steps": [[line["round"], line["loss"], line["grad_norm"]] for line in lines],
        "metrics": {key: _digest([repr([line.get(key) for line in lines]).encode()])[:12]
                    for key in keys if not key.startswith(_OF_THE_MACHINE)},
        "samples": [_samples(path) for path in sorted((folder / "pairs").glob("round_*"))],
        "evaluation": [line.get("evaluation", {}) for line in _read_jsonl(folder / "rounds.jsonl")],
        "weights": {name: _weights(folder / name) for name in ("hf", "hf_reward")
                    if (folder / name).is_dir()},
    }


def _samples(folder: Path) -> dict[str, str]:
    """Digests of a round's samples: ids, log-probabilities, and what was computed of them later.

    The rows are brought into the order of their prompts, samples of one prompt in the order in
    which they stand, so that the cut into files does not matter.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files]
    columns = ["ordinal", "prompt_ids", "demo_ids", "sample_ids", "sample_logprobs",
               "ref_demo_logp", "ref_sample_logp", "reward_demo", "reward_sample"]
    table = pa.concat_tables([table.select(columns) for table in tables])
    rows = table.to_pydict()
    order = np.argsort(np.array(rows["ordinal"]), kind="stable")

    def digest(name: str, dtype: Any) -> bytes:
        """Lengths and values, in prompt order; a number that was not computed is marked."""
        values = [rows[name][i] for i in order]
        lists = [v if isinstance(v, list) else [] if v is None else [v] for v in values]
        lengths = np.array([len(v) for v in lists], np.int64)
        flat = np.array([x for v in lists for x in v], dtype)
        return lengths.tobytes() + flat.tobytes()

    # Parquet gives float32 back as doubles; the way back is exact.
    return {
        "ids": _digest(digest(n, np.int64) for n in columns[:4]),
        "logps": _digest([digest("sample_logprobs", np.float32)]),
        "references": _digest(digest(n, np.float32) for n in columns[5:7]),
        "rewards": _digest(digest(n, np.float32) for n in columns[7:9]),
    }


def _weights(folder: Path) -> str:
    from safetensors import safe_open

    tensors: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:  # torch: numpy has no bfloat16
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name).contiguous()
                said = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
                tensors[name] = said + tensor.flatten().view(_uint8()).numpy().tobytes()
    assert tensors, f"{folder} has no weights"
    return _digest(tensors[name] for name in sorted(tensors))


def _uint8() -> Any:
    import torch

    return torch.uint8


def _digest(parts: Iterable[bytes]) -> str:
    """The first half of the SHA-256 of some bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:_HEX_DIGITS]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
