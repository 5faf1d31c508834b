"""A model family that the package has never heard of: one file and its registry line, no more."""

import pytest
import torch

from megatron_irl.families import registry
from megatron_irl.families.architecture import Family
from megatron_irl.families.config_values import flag, refuse, required_size, size
from megatron_irl.families.llama_like import LLAMA_ROWS, default_head_dim, llama_like
from tests.cli.harness import read_jsonl, refused, run, write_jsonl, write_recipe
from tests.convert.tiny import make_tiny_llama

# --- what the family's file would be

NAME = "SeedOssForCausalLM"


def _read(hf_config):
    refuse(hf_config, "mlp_bias")
    groups = required_size(
        hf_config, "num_key_value_heads", size(hf_config, "num_attention_heads"), NAME)
    return llama_like(
        hf_config, NAME, groups=groups, windows={},
        head_dim=required_size(hf_config, "head_dim", default_head_dim(hf_config, groups), NAME),
        add_qkv_bias=flag(hf_config, "attention_bias"),
        proj_bias=flag(hf_config, "attention_out_bias"),
    )


SEED_OSS = Family(NAME, "seed_oss", _read, LLAMA_ROWS)

# --- and its line


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, NAME, SEED_OSS)


@pytest.fixture
def seed_oss(tmp_path):
    return make_tiny_llama(
        tmp_path / "seed_oss", family="seed_oss", layers=2, hidden=32, heads=4, kv_heads=2,
        intermediate=64, head_dim=12, attention_bias=True, attention_out_bias=True, mlp_bias=False,
    )


def reference(model, ids):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_it_generates_as_transformers_and_trains_to_a_folder_of_its_kind(
    registered, seed_oss, sections, tmp_path, no_report
):
    prompt = "3+4 is"
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}])
    result = run("generate", "--model", seed_oss, "--prompts", asked, "--out", tmp_path / "o.jsonl",
                 "--temperature", 0, "--max-new-tokens", 8, "--precision", "fp32")
    assert result.code == 0, result.err
    (line,) = read_jsonl(tmp_path / "o.jsonl")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(seed_oss)(prompt)["input_ids"]
    logprobs = reference(seed_oss, ids + line["token_ids"])[len(ids) - 1 : -1]
    assert logprobs.argmax(-1).tolist() == line["token_ids"]
    best = logprobs.max(-1).values
    torch.testing.assert_close(torch.tensor(line["logprobs"]), best, atol=1e-4, rtol=0)

    sections["model"] = {"hf": str(seed_oss)}
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    after = reference(tmp_path / "run" / "hf", ids)
    assert torch.isfinite(after).all() and not torch.equal(after, reference(seed_oss, ids))


def test_without_its_line_it_is_unknown(seed_oss, sections, tmp_path):
    sections["model"] = {"hf": str(seed_oss)}
    refused("train", write_recipe(tmp_path / "r.yaml", **sections),
            named=(f"architecture {NAME}", "LlamaForCausalLM"))
