"""The reward folder is transformers' own sequence classifier, and comes back bitwise."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.reward_folder import read_reward_head, reward_config
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert import reward_jobs
from tests.convert.test_round_trip import SP, SPARSE, assert_same_weights, layout_of, weights
from tests.convert.test_stream import ignore

EOS = 1
MODELS = {
    "untied": {"max_shard_size": "40KB"},
    "tied": {"tied": True},
    "mistral": {"family": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "gpt_neox": {"family": "gpt_neox", "scale": 0.25},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2", "head_dim": 16, "tied": True},
    "gemma3": {"family": "gemma3_text", "head_dim": 16, "tied": True},
} | SPARSE
PP2_VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2_EP2 = layout_of("mixtral", "tp2_ep2")[1]
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
CASES = [
    ("untied", 1, {}), ("tied", 1, {}), ("mistral", 1, {}), ("qwen2", 1, {}), ("qwen3", 1, {}),
    ("gpt_neox", 1, {}), ("gpt_neox", 4, TP2_PP2),
    ("untied", 2, {"tensor_model_parallel_size": 2}), ("tied", 2, PP2_VPP2), ("untied", 2, {}),
    ("mixtral", 2, TP2_EP2), ("qwen3_moe", 4, TP2_PP2 | SP),
    ("tied", 4, TP2_PP2), ("phi3", 1, {}), ("gemma2", 1, {}), ("gemma3", 1, {}),
]


def options_of(name):
    """What a model is made with, for ``folder``."""
    return {"seed": 577, **MODELS[name]}


def random_head(seed: int, size: int = 64) -> list[float]:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).tolist()


def expected_scores(source, head: list[float], rows: list[list[int]]) -> list[float]:
    """head . hidden at the last token, of the language model itself, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
    return [(torch.tensor(head) @ h).item() for h in hidden]


def random_rows(seed: int, num: int = 6) -> list[list[int]]:
    """Token ids of several lengths; the first half ends with EOS, the rest is truncated."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (num,), generator=generator).tolist()
    rows = [torch.randint(3, 98, (n,), generator=generator).tolist() for n in lengths]
    return [ids + [EOS] if i < num // 2 else ids for i, ids in enumerate(rows)]


@pytest.mark.parametrize(("name", "ranks", "layout"), CASES)
def test_transformers_gives_the_same_scores(pool, folder, tmp_path, name, ranks, layout):
    source, out, head = folder(name), tmp_path / "hf_reward", random_head(ranks)
    refused = pool.run(ranks, reward_jobs.export, hf=str(source), layout=layout, head=head,
                       out=str(out))
    assert refused == [""] * ranks
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.num_labels == 1 and model.dtype == torch.float32

    rows = random_rows(len(name))
    pad = model.config.pad_token_id
    assert pad is not None and pad != EOS
    longest = max(map(len, rows))
    for side in ("left", "right"):
        fill = [[pad] * (longest - len(ids)) for ids in rows]
        ids = torch.tensor([f + r if side == "left" else r + f
                            for f, r in zip(fill, rows, strict=True)])
        mask = torch.tensor([[0] * len(f) + [1] * len(r) if side == "left"
                             else [1] * len(r) + [0] * len(f)
                             for f, r in zip(fill, rows, strict=True)])
        with torch.no_grad():  # positions count from the first real token, as when trained
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            scores = model.eval()(ids, attention_mask=mask, position_ids=positions).logits
        assert scores.shape == (len(rows), 1)
        assert scores[:, 0].tolist() == pytest.approx(expected_scores(source, head, rows),
                                                      abs=1e-4)


@pytest.mark.parametrize(("name", "ranks", "layout"), [
    *CASES[-2:], ("gpt_neox", 2, {}), ("mixtral", 2, TP2_EP2)])
def test_conversion_is_lossless_both_ways(pool, folder, tmp_path, name, ranks, layout):
    """Backbone bitwise the source's without its output head; the head bitwise what went in."""
    source, out, head = folder(name), tmp_path / "hf_reward", random_head(7)
    pool.run(ranks, reward_jobs.export, hf=str(source), layout=layout, head=head, out=str(out),
             max_shard_bytes=50_000)
    got, expected = weights(out), weights(source)
    for output_head in ("lm_head.weight", "embed_out.weight"):
        expected.pop(output_head, None)
    assert got.pop("score.weight").tolist() == [head]
    assert got.keys() == expected.keys()
    assert [n for n in got if not torch.equal(got[n], expected[n])] == []
    read = read_reward_head(out)
    assert read.tolist() == [head] and read.dtype == torch.float32
    assert not list(tmp_path.glob(".*"))  # no partial folder


def test_head_stays_float32_in_a_bf16_folder(pool, folder, tmp_path):
    head = random_head(3)
    pool.run(1, reward_jobs.export, hf=str(folder("tied")), layout={}, head=head,
             out=str(tmp_path / "out"), dtype=torch.bfloat16)
    assert read_reward_head(tmp_path / "out").tolist() == [head]
    tensors = weights(tmp_path / "out")
    tensors.pop("score.weight")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_pads_with_what_the_model_skips(pool, folder, tmp_path):
    """Text in, score out, batched: the folder's tokenizer and config agree on padding."""
    source, out, head = folder("tied"), tmp_path / "out", random_head(5)
    pool.run(1, reward_jobs.export, hf=str(source), layout={}, head=head, out=str(out))
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert tokenizer.pad_token == "<|im_start|>"  # the source pads with EOS
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert AutoTokenizer.from_pretrained(source).pad_token_id == EOS  # its files are untouched
    texts = ["Q: 2+2? A: 4<|im_end|>", "A: no<|im_end|>", "cut of"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert [ids[-1] == EOS for ids in rows] == [True, True, False]
    assert scores[:, 0].tolist() == pytest.approx(expected_scores(source, head, rows), abs=1e-4)


@pytest.mark.parametrize(("change", "plain", "expected"), [
    ({"pad_token": "~"}, [], "~"),  # its own is kept
    ({"extra_special_tokens": ["<|im_start|>", "<|pad|>"]}, [], "<|pad|>"),
    ({"bos_token": "<unk>"}, [], "<unk>"),
    ({}, ["<|im_start|>"], "<unk>"),
    ({}, ["<|im_start|>", "<unk>"], None),  # one sequence at a time, then
])
def test_padding_never_ends_a_response(pool, folder, tmp_path, change, plain, expected):
    """``plain`` tokens are not special any more."""
    source = shutil.copytree(folder("tied"), tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens(change)
    tokenizer.save_pretrained(source)
    settings = json.loads((source / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in plain
    (source / "tokenizer.json").write_text(json.dumps(settings))
    pool.run(1, reward_jobs.export, hf=str(source), layout={}, head=random_head(1),
             out=str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    made = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"]
    if expected is None:
        assert config["pad_token_id"] is None and made == "<|im_end|>"
    else:
        assert made == expected
        assert config["pad_token_id"] == tokenizer.convert_tokens_to_ids(expected)


def test_run_without_a_reward_is_refused(pool, folder, tmp_path):
    (message,) = pool.run(1, reward_jobs.export, hf=str(folder("tied")), layout={}, head=None,
                          out=str(tmp_path / "out"))
    assert "no reward head" in message and "rft" in message
    assert not list(tmp_path.iterdir())


def test_reader_names_what_is_wrong(folder, tmp_path):
    with pytest.raises(UserError, match="has no score.weight"):
        read_reward_head(folder("tied"))
    for tensor, message in ((torch.zeros(2, 64), r"shape \[2, 64\]"),
                            (torch.full((1, 64), torch.nan), "NaN")):
        path = shutil.copytree(folder("tied"), tmp_path / message[:3])
        file = path / "model.safetensors"
        save_file(load_file(file) | {"score.weight": tensor}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            read_reward_head(path)


@pytest.mark.parametrize("name", ["untied", "tied", "gpt_neox", "qwen3_moe"])
def test_tools_convert_it_there_and_back(pool, folder, tmp_path, name):
    """Through a Megatron checkpoint, bitwise, config and padding as they were."""
    made, there, back = tmp_path / "hf_reward", tmp_path / "megatron", tmp_path / "hf"
    pool.run(1, reward_jobs.export, hf=str(folder(name)), layout={}, head=random_head(9),
             out=str(made))
    plan = hf_to_megatron(made, there)
    assert "reward head" in plan.plan[1]
    plan.run(ignore)
    megatron_to_hf(there / "release", back, hf_dir=there / "hf").run(ignore)
    assert_same_weights(back, made)
    for file in ("config.json", "tokenizer_config.json"):
        assert (back / file).read_bytes() == (made / file).read_bytes()


def test_cast_leaves_the_head_in_float32(pool, folder, tmp_path):
    made, there = tmp_path / "hf_reward", tmp_path / "megatron"
    pool.run(1, reward_jobs.export, hf=str(folder("tied")), layout={}, head=random_head(2),
             out=str(made))
    hf_to_megatron(made, there, dtype=torch.bfloat16).run(ignore)
    megatron_to_hf(there / "release", tmp_path / "back", hf_dir=there / "hf").run(ignore)
    tensors = weights(tmp_path / "back")
    assert tensors.pop("score.weight").tolist() == [random_head(2)]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_reward_of_a_checkpoint_without_one_is_refused(folder, tmp_path):
    hf_to_megatron(folder("untied"), tmp_path / "megatron").run(ignore)
    with pytest.raises(UserError, match="holds no reward head. Only runs with algorithm.name=rft"):
        megatron_to_hf(tmp_path / "megatron" / "release", tmp_path / "out",
                       hf_dir=folder("untied"), reward=True)
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


def test_reward_models_that_will_not_do(folder):
    config = reward_config(read_hf_config(folder("tied")))
    assert architecture(config, reward_model=True).reward
    with pytest.raises(UserError, match="is a reward model without a language-model head"):
        architecture(config)
    config["id2label"] = {"0": "bad", "1": "good"}
    with pytest.raises(UserError, match="has 2 labels"):
        architecture(config, reward_model=True)
