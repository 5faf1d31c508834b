"""Time and peak memory of converting random Llama-shaped models there and back, bitwise checked.

    python tools/benchmark_conversion.py --billions 1 3
    python tools/benchmark_conversion.py --hf models/SmolLM2-135M-Instruct

With ``--billions`` a bf16 folder of about that many parameters is written, converted to a
distributed checkpoint and back, each by the tool in a process of its own whose peak resident
memory is read from the kernel, compared byte for byte, and deleted. With ``--hf`` a folder is
converted there and back, side by side with ``save_pretrained(from_pretrained(...))`` of
transformers, each in a process of its own.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from megatron_irl.convert.hf_config import architecture
from megatron_irl.convert.hf_folder import HfWeights
from megatron_irl.convert.safetensors_writer import ShardedWriter, TensorPlan
from megatron_irl.families.table import rows

TOOLS = Path(__file__).parent

# Runs a program in this process and reports the peak of its resident memory, which the kernel
# counts from the process's own start (ru_maxrss would begin with that of the process before it).
RUNNER = """
import runpy, sys
report = sys.argv.pop(1)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    open(report, "w").write(peak)
"""

RESAVE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
"""


def config_of(billions: float) -> dict[str, Any]:
    """A Llama config with 128-wide heads and at least so many parameters."""
    hidden = 2048 if billions < 2 else 3072
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_attention_heads": hidden // 128, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "num_hidden_layers": 1,
    }
    while parameters(config) < billions * 1e9:
        config["num_hidden_layers"] += 1
    return config


def parameters(config: dict[str, Any]) -> int:
    arch = architecture(config)
    return sum(torch.Size(row.shape(arch)).numel() for row in rows(arch))


def write_random(folder: Path, config: dict[str, Any]) -> int:
    """Write the folder tensor by tensor; returns its weights' bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = architecture(config)
    plan = [
        TensorPlan(t.name, t.shape(arch), torch.bfloat16) for r in rows(arch) for t in r.hf
    ]
    writer = ShardedWriter(folder, plan, 5 * 10**9)
    # Drawing billions of numbers would take longer than converting them: every tensor is cut from
    # one stretch of them, from a place of its own.
    noise = torch.empty(2**24, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
    for place, tensor in enumerate(plan):
        count = torch.Size(tensor.shape).numel()
        start = 7919 * place % 2**20
        values = noise.repeat(-(-(start + count) // noise.numel()))[start : start + count]
        writer.add(tensor.name, values.view(tensor.shape))
    writer.close()
    return writer.total_bytes


class Cost(NamedTuple):
    """What a process took: seconds by the clock and of CPU time, and its peak resident MiB."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(program: Path, *arguments: object) -> Cost:
    """Run a Python file in a process of its own. On a busy machine CPU time is the fair number."""
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
    with tempfile.NamedTemporaryFile("r") as report:
        command = [sys.executable, "-c", RUNNER, report.name, str(program), *map(str, arguments)]
        start, cpu = time.perf_counter(), cpu_of_children()
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            raise SystemExit(f"{program} ended with exit code {done.returncode}")
        return Cost(seconds, cpu_of_children() - cpu, int(report.read()) / 1024)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    first, second = HfWeights(one), HfWeights(other)
    return first.files.keys() == second.files.keys() and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in _pairs(first, second)
    )


def _pairs(one: HfWeights, other: HfWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for name in one.files:
        tensors = []
        for weights in (one, other):
            with safe_open(weights.where(name), framework="pt") as file:
                tensors.append(file.get_tensor(name).flatten())
        yield tensors[0], tensors[1]


def there_and_back(source: Path, folder: Path, weight_bytes: int) -> None:
    """Convert both ways, print, and leave nothing."""
    there, back = folder / "megatron", folder / "hf"
    commands = {
        "HF → Megatron": (TOOLS / "convert_hf_to_megatron.py", "--hf", source, "--out", there),
        "Megatron → HF": (
            TOOLS / "convert_megatron_to_hf.py", "--checkpoint", there, "--out", back
        ),
    }
    for name, command in commands.items():
        report(name, measure(*command), weight_bytes)
    print(f"  bitwise equal: {same_weights(source, back)}")
    for path in (there, back):
        shutil.rmtree(path)


def report(name: str, cost: Cost, weight_bytes: int) -> None:
    gigabytes = weight_bytes / 1e9
    print(
        f"  {name}: {cost.seconds:.1f} s ({cost.seconds / gigabytes:.2f} s/GB), CPU "
        f"{cost.cpu_seconds:.1f} s ({cost.cpu_seconds / gigabytes:.2f} s/GB), peak "
        f"{cost.peak_mib:.0f} MiB", flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and peak memory of conversion.")
    parser.add_argument("--billions", type=float, nargs="*", default=[], help="parameters")
    parser.add_argument("--hf", type=Path, help="a folder to compare on with transformers")
    parser.add_argument("--repeat", type=int, default=3, help="runs of the comparison")
    parser.add_argument("--work", type=Path, help="where to put the files (default: temporary)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        for billions in options.billions:
            config = config_of(billions)
            source = folder / f"{billions:g}b"
            size = write_random(source, config)
            print(f"{parameters(config) / 1e9:.3f} B parameters, {size / 1e9:.2f} GB bf16")
            there_and_back(source, folder, size)
            shutil.rmtree(source)
        for _ in range(options.repeat if options.hf else 0):
            size = sum(p.stat().st_size for p in options.hf.glob("*.safetensors"))
            print(f"{options.hf}, {size / 1e9:.2f} GB")
            there_and_back(options.hf, folder, size)
            (folder / "resave.py").write_text(RESAVE)
            cost = measure(folder / "resave.py", options.hf, folder / "resaved")
            report("transformers, load and save", cost, size)
            shutil.rmtree(folder / "resaved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
