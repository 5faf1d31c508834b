"""Convert a Hugging Face folder to a Megatron distributed checkpoint.

    python tools/convert_hf_to_megatron.py --hf models/llama --out checkpoints/llama

Training does not need this: a recipe names the HF folder itself. One process converts a model of
any size in the memory of a few tensors; any layout reads the result. Started again after an
interruption, it goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_irl.cli.conversion import run_conversion, run_tool
from megatron_irl.convert.stream import hf_to_megatron


def convert(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    conversion = hf_to_megatron(options.hf, options.out, dtype=dtype)
    run_conversion(conversion, dry_run=options.dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hugging Face folder → Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    options = parser.parse_args(argv)
    return run_tool("convert_hf_to_megatron", lambda: convert(options))


if __name__ == "__main__":
    sys.exit(main())
