"""Decoding on a GPU beside ``transformers.generate``: same shape, dtype, prompts, in one process.

    python tools/benchmark_decoding.py [--shape 1.1B] [--requests 64 256] [--peer] [--ragged]

Weights are random (speed does not ask what they say). A line of JSON per case: milliseconds a
decode step over the whole call, prompts included; the decode steps alone; and the share of the
bandwidth limit these reach, which is reading all weights and the cache once a step. ``--ragged``
adds a queue of eight times the requests, with equal budgets and with unequal ones of the same sum.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import architecture
from megatron_irl.generation import SamplingConfig
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.parallel.topology import Topology, initialize, shutdown

SHAPES = {
    "tiny": (256, 512, 4, 4, 2, 32000),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
    "2.8B": (4096, 14336, 8, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes a second, by the maker


def main() -> None:
    options = parse_arguments()
    topology = initialize(ParallelConfig())
    config = hf_config(options.shape)
    chunks = build(config, topology)
    for requests in options.requests:
        prompts = random_prompts(requests, options.prompt_tokens, config["vocab_size"])
        budgets = [options.new_tokens] * requests
        report = ours(chunks, topology, config, prompts, budgets, options)
        if options.peer:
            report["transformers_ms_per_step"] = peer(config, prompts, options)
            report["times_transformers"] = round(
                report["transformers_ms_per_step"] / report["ms_per_step"], 2
            )
        print(json.dumps({"shape": options.shape, "requests": requests, **report}), flush=True)
        if options.ragged:
            print(json.dumps(ragged(chunks, topology, config, requests, options)), flush=True)
    shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--cuda-graphs", default="auto", help="auto, off or a number")
    parser.add_argument("--burst", type=int, default=32, help="steps between two looks by the host")
    parser.add_argument("--peer", action="store_true", help="time transformers.generate as well")
    parser.add_argument("--ragged", action="store_true")
    return parser.parse_args()


def hf_config(shape: str) -> dict[str, Any]:
    """The ``config.json`` of a Llama of this shape."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }


def build(config: dict[str, Any], topology: Topology, **overrides: Any) -> list[Any]:
    """The model in bf16 on the device, weights random."""
    arch = architecture(config)
    transformer = build_config(arch, ParallelConfig(), precision="bf16", overrides=overrides)
    chunks = build_chunks(transformer, arch, topology)
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    return chunks


def random_prompts(count: int, length: int, vocab: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, length).astype(np.int32) for _ in range(count)]


def make_generator(
    chunks: Sequence[Any], topology: Topology, config: dict[str, Any], requests: int,
    options: argparse.Namespace, longest: int | None = None,
) -> MegatronGenerator:
    return MegatronGenerator(
        chunks, topology, vocab_size=config["vocab_size"], max_requests=requests,
        max_sequence_length=options.prompt_tokens + (longest or options.new_tokens),
        cuda_graphs=options.cuda_graphs, keep_cache="true", burst_steps=options.burst,
    )


def ours(
    chunks: Sequence[Any], topology: Topology, config: dict[str, Any],
    prompts: list[np.ndarray], budgets: list[int], options: argparse.Namespace,
) -> dict[str, Any]:
    """Time a whole call, and within it the decode steps that hold no prompt."""
    sampling = SamplingConfig(eos_id=config["vocab_size"])
    with make_generator(chunks, topology, config, len(prompts), options) as generator:
        generator.generate(prompts, sampling, max_new_tokens=budgets)  # kernels, captures
        loop = generator._built.loop if generator._built else None
        assert loop is not None
        seconds, decode = [], []
        for _ in range(3):
            steps, spent = loop.step_count, loop.seconds
            torch.cuda.synchronize()
            start = time.perf_counter()
            generator.generate(prompts, sampling, max_new_tokens=budgets)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            decode.append((loop.seconds - spent) / (loop.step_count - steps))
        cache = 2 * np.dtype(np.float16).itemsize * config["num_hidden_layers"] * (
            config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
        ) * len(prompts) * (options.prompt_tokens + options.new_tokens / 2)
        weights = sum(p.numel() * p.element_size() for c in chunks for p in c.parameters())
        name = torch.cuda.get_device_name()
        speed = next((s for n, s in BANDWIDTH.items() if n in name), float("nan"))
        return {
            "ms_per_step": round(1000 * min(seconds) / options.new_tokens, 3),
            "decode_ms_per_step": round(1000 * min(decode), 3),
            "bandwidth_share": round((weights + cache) / speed / min(decode), 3),
            "tokens_per_second": round(sum(budgets) / min(seconds)),
            "graphs": generator.graph_count,
            "capture_seconds": round(generator.take_capture_seconds(), 1), "device": name,
        }


def ragged(
    chunks: Sequence[Any], topology: Topology, config: dict[str, Any], requests: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A queue of eight times the requests: equal budgets against unequal ones of the same sum."""
    count, mean = 8 * requests, options.new_tokens
    prompts = random_prompts(count, options.prompt_tokens, config["vocab_size"])
    spread = np.random.default_rng(1).integers(-mean // 2, mean // 2 + 1, count // 2)
    unequal = np.concatenate([mean + spread, mean - spread]).tolist()
    sampling = SamplingConfig(eos_id=config["vocab_size"])
    speed = {}
    with make_generator(chunks, topology, config, requests, options, 2 * mean) as generator:
        generator.generate(prompts[:requests], sampling, max_new_tokens=unequal[:requests])
        for name, budgets in (("equal", [mean] * count), ("ragged", unequal)):
            start = time.perf_counter()
            generator.generate(prompts, sampling, max_new_tokens=budgets)
            speed[name] = round(sum(budgets) / (time.perf_counter() - start))
    return {
        "shape": options.shape, "places": requests, "queue": count, "tokens_per_second": speed,
        "ragged_to_equal": round(speed["ragged"] / speed["equal"], 3),
    }


def peer(config: dict[str, Any], prompts: list[np.ndarray], options: argparse.Namespace) -> float:
    """Milliseconds a step of ``transformers.generate``, the whole call."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        max_new_tokens=options.new_tokens,
    )
    ids = torch.from_numpy(np.stack(prompts)).long().cuda()
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert out.shape[1] == ids.shape[1] + options.new_tokens
    return round(1000 * min(seconds) / options.new_tokens, 3)


if __name__ == "__main__":
    main()
