"""What the ranks of the families' tests run; importable by name."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

from torch import Tensor

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.convert.load import global_parameters
from megatron_irl.data.packing import pack
from megatron_irl.families.table import hf_tensors, rows
from megatron_irl.generation import SamplingConfig, every_expert
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.forward import HeadProcessor, forward_packed
from tests.dist.jobs import build, random_sequences


def as_stored(tensors: dict[str, Tensor], *, mixtral: bool) -> dict[str, Tensor]:
    """transformers' tensors by the names they have in files: one for every matrix of an expert."""
    stored: dict[str, Tensor] = {}
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, value in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        head, found, kind = name.partition("experts.")
        if not found:
            stored[name] = value
            continue
        parts = [value] if kind == "down_proj" else list(value.chunk(2, dim=1))
        for part, matrix in zip(parts, names[2:] if len(parts) == 1 else names[:2], strict=True):
            for expert, tensor in enumerate(part):
                stored[f"{head}experts.{expert}.{matrix}.weight"] = tensor
    return stored


def likelihood_step(hf: str, seed: int, num: int, vocab: int) -> dict[str, Tensor]:
    """Gradients of the summed negative log-likelihood of responses, as HF tensors by name."""
    _, (chunk,), _, arch = build(hf, {})
    batch = pack(random_sequences(seed, num, vocab), None)
    (-forward_packed(chunk, batch, HeadProcessor(rows_at_once=7)).sum()).backward()
    gradients = {name: p.grad for name, p in global_parameters([chunk]) if p.grad is not None}
    return {
        tensor.name: value
        for row in rows(arch) if row.megatron in gradients
        for tensor, value in zip(
            row.hf, hf_tensors(row, [gradients[row.megatron]], arch), strict=True
        )
    }


def generate_through_all(hf: str, layout: dict, seed: int, vocab: int) -> list[Any]:
    """(tokens, log-probabilities) of sampled requests, as they are and with every token sent to all
    experts, which a GPU does; and how many mixtures were called so.
    """
    topology, chunks, _, _ = build(hf, layout)
    prompts = [prompt for prompt, _ in random_sequences(seed, 8, vocab)]
    sampling = SamplingConfig(max_new_tokens=16, seed=3, eos_id=10**6)
    results, calls = [], []
    original = every_expert._to_all

    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(1)
        return original(*given, **named)

    for context in (nullcontext(), every_expert.every_expert(chunks[0])):
        with context, mock.patch.object(every_expert, "_to_all", counted), MegatronGenerator(
            chunks, topology, max_sequence_length=64, vocab_size=vocab, max_requests=4
        ) as generator:
            samples = generator.generate(prompts, sampling)
        results.append([(s.token_ids.tolist(), s.logprobs.tolist()) for s in samples])
        results.append(len(calls))
    return results
