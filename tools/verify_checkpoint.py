"""Compare a model's log-probabilities between transformers and Megatron, and between layouts.

    python tools/verify_checkpoint.py --hf models/llama --checkpoint checkpoints/llama
    python tools/verify_checkpoint.py --hf runs/irft/hf
    python tools/verify_checkpoint.py --hf runs/irft/adapter    (peft reads it on its base)

transformers reads ``--hf``; Megatron reads ``--checkpoint``, or ``--hf`` itself without one, once
per layout, in fp32. If nothing differs by more than the bound, ``certificate.json`` is written into
the folders that were converted. Exit codes: 0 verified, 1 too far apart, 2 the input is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_irl.cli.verification import (
    Layout,
    largest_difference,
    megatron_logprobs,
    read_sequences,
    score_as_rank,
    transformers_logprobs,
)
from megatron_irl.config import hub_snapshot
from megatron_irl.errors import UserError


def verify(options: argparse.Namespace) -> int:
    from megatron_irl.convert.certificate import CERTIFICATE
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.hf_folder import validate_hf_folder
    from megatron_irl.convert.locate import find_checkpoint
    from megatron_irl.convert.peft_folder import model_folder

    options.hf = hub_snapshot(options.hf)
    arch = architecture(read_hf_config(model_folder(options.hf)))
    validate_hf_folder(options.hf, arch)
    checkpoint = find_checkpoint(options.checkpoint) if options.checkpoint else None
    sequences = read_sequences(options.hf, options.prompts, arch, max_tokens=options.max_tokens)
    layouts, skipped = _fitting(options.layouts, arch)
    expected = transformers_logprobs(options.hf, sequences)
    program = (str(Path(__file__).resolve()),)
    scores = {
        layout.name: megatron_logprobs(options.hf, checkpoint, layout, sequences, program)
        for layout in layouts
    }
    first = next(iter(scores.values()))
    measured = {
        name: {
            "from_transformers": largest_difference(score, expected),
            f"from_{layouts[0].name}": largest_difference(score, first),
        }
        for name, score in scores.items()
    }
    for name, numbers in measured.items():
        words = ", ".join(f"{key.replace('_', ' ')} {value:.2e}" for key, value in numbers.items())
        sys.stdout.write(f"{name}: {words}\n")
    for name, reason in skipped.items():
        sys.stdout.write(f"{name}: skipped, {reason}\n")
    worst = max(value for numbers in measured.values() for value in numbers.values())
    if not worst <= options.bound:
        sys.stderr.write(
            f"verify_checkpoint: log-probabilities differ by {worst:.3g} nats, more than the bound "
            f"of {options.bound:g}. No certificate was written.\n"
        )
        return 1
    findings = {
        "hf": str(options.hf.resolve()), "checkpoint": str(checkpoint and checkpoint.resolve()),
        "precision": "fp32", "bound_nats": options.bound, "largest_difference_nats": measured,
        "skipped": skipped, "sequences": len(sequences), "tokens": sum(map(len, sequences)),
        "prompts": str(options.prompts or "built in"),
    }
    for folder in _certify(options, checkpoint, findings):
        sys.stdout.write(f"wrote {folder / CERTIFICATE}\n")
    return 0


def _fitting(layouts: list[str], arch: Any) -> tuple[list[Layout], dict[str, str]]:
    """The layouts that divide the model, and why the others do not."""
    from megatron_irl.model.build import check_model_layout

    fitting, skipped = [], {}
    for layout in map(Layout.parse, layouts):
        try:
            check_model_layout(arch, layout.parallel(arch), "fp32")
            fitting.append(layout)
        except UserError as error:
            skipped[layout.name] = str(error)
    if not fitting:
        raise UserError(f"--layouts {' '.join(layouts)}: none of them divides the model.")
    return fitting, skipped


def _certify(
    options: argparse.Namespace, checkpoint: Path | None, findings: dict[str, Any]
) -> list[Path]:
    """Write the certificates; returns the folders."""
    from megatron_irl.convert.certificate import NOTE, write_certificate

    folders = []
    if checkpoint is not None:
        root = options.checkpoint if checkpoint.is_relative_to(options.checkpoint) else checkpoint
        write_certificate(root, checkpoint, findings)
        folders.append(root)
    if checkpoint is None or (options.hf / NOTE).exists():
        write_certificate(options.hf, options.hf, findings)
        folders.append(options.hf)
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="transformers and Megatron, side by side.")
    parser.add_argument("--hf", type=Path, help="HF folder; what transformers reads")
    parser.add_argument("--checkpoint", type=Path, help="what Megatron reads (default: --hf)")
    parser.add_argument("--prompts", type=Path, help='JSONL of {"prompt": ...}; default: built in')
    parser.add_argument("--layouts", nargs="+", default=["tp1pp1", "tp2pp1", "tp1pp2"])
    parser.add_argument("--bound", type=float, default=1e-4, help="nats, on every token")
    parser.add_argument("--max-tokens", type=int, default=512, help="of one sequence")
    parser.add_argument("--rank-job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.rank_job is not None:
            score_as_rank(options.rank_job)
            return 0
        if options.hf is None:
            raise UserError("--hf is missing. Give the Hugging Face folder to compare with.")
        return verify(options)
    except UserError as error:
        print(f"verify_checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
