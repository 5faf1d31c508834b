"""What evaluations ask of a policy equals what transformers says, in every layout."""

import random

import pytest

from tests.convert.tiny import make_tiny_llama
from tests.dist import evaluation_jobs
from tests.dist.layouts import LAYOUTS

MAX_NEW = 12


@pytest.fixture(scope="module")
def asked():
    rng = random.Random(7)

    def text(low, high):
        return "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(low, high)))

    pairs = [(text(3, 40), " " + text(1, 9)) for _ in range(12)]
    pairs += [("", "no context"), ("ends with spaces   ", "x"), ("a" * 300, " too long")]
    return {"pairs": pairs, "texts": [text(5, 60), "a b c" * 120], "prompts": [
        text(4, 12) for _ in range(5)]}


@pytest.fixture(scope="module")
def expected(asked, tmp_path_factory):
    """(folder, a tail and stop texts that follow from the model, transformers' answers)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(make_tiny_llama(tmp_path_factory.mktemp("text") / "hf", layers=2, vocab=98))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def score(ids, count):
        """Log-probability of the last ``count`` ids, and whether each is the likeliest."""
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, -count:]
        target = torch.tensor(ids[-count:])
        logps = torch.log_softmax(logits.double(), -1)
        return float(logps[range(count), target].sum()), bool((logits.argmax(-1) == target).all())

    def greedy(prompt):
        out = model.generate(torch.tensor([encode(prompt)]), do_sample=False,
                             max_new_tokens=MAX_NEW, eos_token_id=1, pad_token_id=1)[0]
        return tokenizer.decode(out[len(encode(prompt)):], skip_special_tokens=True)

    free = [greedy(prompt) for prompt in asked["prompts"]]
    # One continuation that greedy decoding does give, and a stop text that does come.
    certain = (asked["prompts"][0], free[0][:4])
    pairs = [*asked["pairs"], certain]
    found = []
    for context, continuation in pairs:
        bare = context.rstrip()
        head, whole = encode(bare), encode(context + continuation)
        ids = ([1] if not head else []) + whole
        found.append(score(ids[-257:], len(whole) - len(head)))
    texts = []
    for text in asked["texts"]:
        ids, total = encode(text), 0.0
        for start in range(0, len(ids), 256):  # each token once, the last window reaches back
            end = min(start + 256, len(ids))
            window = ([1] + ids[:end]) if start == 0 else ids[max(0, end - 257) : end]
            total += score(window, end - start)[0]
        texts.append(total)
    stop = free[1][3:5]
    cut = [text.split(stop)[0] for text in free]
    return folder, pairs, stop, {"pairs": found, "texts": texts, "free": free, "until": cut}


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2"])
def test_scores_and_answers_equal_transformers(pool, asked, expected, layout):
    folder, pairs, stop, right = expected
    size, fields = LAYOUTS[layout]
    first, *others = pool.run(
        size, evaluation_jobs.answers, hf=folder, layout=fields, pairs=pairs,
        texts=asked["texts"], prompts=asked["prompts"], until=[stop], max_new_tokens=MAX_NEW)
    found = first["found"]
    assert [logp for logp, _ in found["pairs"]] == pytest.approx(
        [logp for logp, _ in right["pairs"]], abs=1e-4)
    assert [greedy for _, greedy in found["pairs"]] == [greedy for _, greedy in right["pairs"]]
    assert found["pairs"][-1][1] and not all(greedy for _, greedy in found["pairs"])
    assert found["texts"] == pytest.approx(right["texts"], abs=1e-3)  # 600 tokens
    assert found["free"] == right["free"]
    assert found["until"] == right["until"] != right["free"]
    for rank in (first, *others):
        assert rank["failing"] == "of the main rank"
        assert "1000000 tokens, the model has 256 positions" in rank["deed_fails"]
    assert all(rank["found"] is None for rank in others)
