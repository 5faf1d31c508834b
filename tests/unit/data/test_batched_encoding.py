"""Records encoded together, across batches and files, give what each gives alone."""

import dataclasses

import numpy as np
import pytest

from megatron_irl.data.tokenizer import load_tokenizer
from tests.unit.data.test_demonstrations import load, write_lines


@pytest.fixture(params=["byte", "sentencepiece"])
def any_tokenizer(request, tmp_path):
    """A tokenizer of either kind that adds a BOS, with a chat template."""
    if request.param == "byte":
        return load_tokenizer(request.getfixturevalue("byte_folder")(adds_bos=True))
    file = tmp_path / "tokenizer.model"
    file.write_bytes(request.getfixturevalue("sentencepiece_model"))
    return load_tokenizer(file, "{{ bos_token }}{% for m in messages %}{{ m.content }}"
                          "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}")


def random_records(seed: int, num: int) -> list[dict]:
    """Prompts of either form of 1 to 60 characters, some with marks that are tokens."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        pieces = rng.choice(["3", " plus ", "é", " is  ", "\n", "<|bos|>", "<s>"],
                            rng.integers(1, 12))
        return "".join(["1", *pieces])

    return [{"prompt": text() if rng.random() < 0.5 else [{"role": "user", "content": text()}],
             "response": text()} for _ in range(num)]


@pytest.mark.parametrize("limit", [None, 1, 150])
def test_records_together_give_what_they_give_alone(tmp_path, any_tokenizer, limit):
    """Across batches and files, with over-long records among them."""
    seed = int(np.random.SeedSequence().entropy % 2**31)
    everything = random_records(seed, 300)
    paths = [write_lines(tmp_path / "a.jsonl", *everything[:140]),
             write_lines(tmp_path / "b.jsonl", *everything[140:])]

    def refuse(text):
        raise AssertionError(f"{text!r} was encoded by itself")

    codec = dataclasses.replace(any_tokenizer.codec, encode_batch=refuse)
    got, report = load(paths, dataclasses.replace(any_tokenizer, codec=codec),
                       max_prompt_length=40, max_response_length=40, limit=limit)
    expected = []
    dropped = 0
    for record in everything:
        ids = alone(any_tokenizer, record)
        if max(map(len, ids)) > 40:
            dropped += 1
        else:
            expected.append(ids)
        if len(expected) == limit:
            break
    assert [(d.prompt_ids.tolist(), d.response_ids.tolist()) for d in got] == expected, seed
    assert (report.kept, report.dropped) == (len(expected), dropped), seed
    assert report.prompt_tokens == sum(len(prompt) for prompt, _ in expected)


def alone(tokenizer, record):
    """Prompt and response of a record: the longest beginning that its prompt has by itself."""
    bos, prompt, response = tokenizer.bos_id, record["prompt"], record["response"]
    if isinstance(prompt, str):
        whole, before = (tokenizer.encode(text) for text in (prompt + response, prompt))
        whole, before = ([i for n, i in enumerate([bos, *ids]) if n != 1 or i != bos]
                         for ids in (whole, before))
        whole.append(tokenizer.eos_id)
    else:
        messages = [*prompt, {"role": "assistant", "content": response}]
        text = tokenizer.template.render(messages).text
        whole = tokenizer.encode(text)
        whole = whole[: whole.index(tokenizer.eos_id, len(prompt_ids(tokenizer, prompt))) + 1]
        before = prompt_ids(tokenizer, prompt)
    count = next((n for n, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b),
                 len(before))
    return whole[:count], whole[count:]


def prompt_ids(tokenizer, messages):
    return tokenizer.encode(tokenizer.template.render(messages, add_generation_prompt=True).text)
