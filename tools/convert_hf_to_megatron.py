"""Convert a Hugging Face folder to a Megatron distributed checkpoint.

    python tools/convert_hf_to_megatron.py --hf models/llama --out checkpoints/llama

Training does not need this: a recipe names the HF folder itself. A model too large for one process
is converted by several: start the tool with torchrun and give the layout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_irl.errors import UserError


def convert(options: argparse.Namespace) -> None:
    """Read the folder slice by slice, write the checkpoint. Collective over every rank."""
    from megatron_irl.config import ParallelConfig
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.load import load_hf_weights, validate_hf_folder
    from megatron_irl.convert.megatron_folder import save_megatron
    from megatron_irl.model.build import build_chunks, build_config
    from megatron_irl.parallel.topology import initialize, shutdown

    hf_config = read_hf_config(options.hf)
    arch = architecture(hf_config)
    validate_hf_folder(options.hf, arch)
    if options.out.exists():  # said before the work, not after it
        raise UserError(f"--out {options.out} exists. Choose another folder, or remove it.")
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    source = hf_config.get("dtype") or hf_config.get("torch_dtype")
    precision = options.precision or ("bf16" if source == "bfloat16" else "fp32")
    config = build_config(arch, parallel, precision=precision)
    topology = initialize(parallel)
    chunks = build_chunks(config, arch, topology)
    load_hf_weights(
        chunks, arch, options.hf, tp_rank=topology.tp_rank, tp_size=topology.tp_size
    )
    save_megatron(chunks, options.out, hf_dir=options.hf, topology=topology)
    shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hugging Face folder → Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: as in config.json")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    try:
        convert(parser.parse_args(argv))
    except UserError as error:
        print(f"convert_hf_to_megatron: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
