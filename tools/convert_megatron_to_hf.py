"""Convert a Megatron distributed checkpoint to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py --checkpoint runs/irft/checkpoints/step_000100 --out hf

``--checkpoint`` is a checkpoint, a run folder (its newest one), or what convert_hf_to_megatron.py
wrote. One process converts a model of any size in the memory of a few tensors, whatever layout
wrote the checkpoint. Started again after an interruption, it goes on where it was.

Of a run with adapters the folder is the merged model, and ``adapter/`` in it the adapter in peft's
format; this needs the run's folder and its base, and memory for the whole model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_irl.cli.conversion import run_conversion, run_tool
from megatron_irl.convert.checkpoint_reader import CheckpointReader
from megatron_irl.convert.locate import find_checkpoint, find_hf_source
from megatron_irl.convert.stream import megatron_to_hf
from megatron_irl.errors import UserError


def convert(options: argparse.Namespace) -> None:
    if options.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb {options.max_shard_gb} is not positive.")
    checkpoint = find_checkpoint(options.checkpoint)
    if CheckpointReader(checkpoint).holds_adapters and not options.reward:
        _convert_adapted(checkpoint, options)
        return
    conversion = megatron_to_hf(
        checkpoint, options.out, hf_dir=options.hf or find_hf_source(checkpoint),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_bytes=int(options.max_shard_gb * 1e9), reward=options.reward,
    )
    run_conversion(conversion, dry_run=options.dry_run)


def _convert_adapted(checkpoint: Path, options: argparse.Namespace) -> None:
    if options.hf is not None:
        raise UserError(f"--hf {options.hf} conflicts with {checkpoint}, whose run says which "
                        "model is below its adapters. Remove --hf.")
    out: Path = options.out
    sys.stdout.write(f"{checkpoint} → {out}, merged; {out / 'adapter'} in peft's format\n")
    if options.dry_run:
        return
    from megatron_irl.cli.adapted import convert_adapted

    convert_adapted(checkpoint, out, max_shard_bytes=int(options.max_shard_gb * 1e9),
                    dtype=getattr(torch, options.dtype) if options.dtype else None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Megatron checkpoint → Hugging Face folder.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--hf", type=Path, help="HF folder with the model's config and tokenizer "
                        "(default: the one the checkpoint came from)")
    parser.add_argument("--reward", action="store_true",
                        help="write the reward model of a run of algorithm.name=rft")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the written weights; default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a weight file")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    options = parser.parse_args(argv)
    return run_tool("convert_megatron_to_hf", lambda: convert(options))


if __name__ == "__main__":
    sys.exit(main())
