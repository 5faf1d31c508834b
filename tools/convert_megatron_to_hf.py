"""Convert a Megatron distributed checkpoint to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py --checkpoint runs/irft/checkpoints/step_000100 --out hf

``--checkpoint`` is a checkpoint, a run folder (its newest one), or what convert_hf_to_megatron.py
wrote. A model too large for one process is converted by several: start the tool with torchrun and
give a layout, which need not be the one that wrote the checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_irl.errors import UserError


def convert(options: argparse.Namespace) -> None:
    """Read the checkpoint, gather tensor by tensor, write. Collective over every rank."""
    import torch

    from megatron_irl.config import ParallelConfig
    from megatron_irl.convert.export import export_hf
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.megatron_folder import (
        checkpoint_dtype,
        find_checkpoint,
        find_hf_source,
        load_megatron,
    )
    from megatron_irl.model.build import build_chunks, build_config
    from megatron_irl.parallel.topology import initialize, shutdown

    checkpoint = find_checkpoint(options.checkpoint)
    hf_dir = options.hf or find_hf_source(checkpoint)
    hf_config = read_hf_config(hf_dir)
    arch = architecture(hf_config)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists. Choose another folder, or remove it.")
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    stored = checkpoint_dtype(checkpoint)
    precision = "bf16" if stored == torch.bfloat16 else "fp32"
    config = build_config(arch, parallel, precision=precision)
    topology = initialize(parallel)
    chunks = build_chunks(config, arch, topology)
    load_megatron(chunks, checkpoint, topology)
    export_hf(
        chunks, arch, hf_config, options.out, source_dir=hf_dir, topology=topology,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
    )
    shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Megatron checkpoint → Hugging Face folder.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--hf", type=Path, help="HF folder with the model's config and tokenizer "
                        "(default: the one the checkpoint came from)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the written weights; default: the checkpoint's")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    try:
        convert(parser.parse_args(argv))
    except UserError as error:
        print(f"convert_megatron_to_hf: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
