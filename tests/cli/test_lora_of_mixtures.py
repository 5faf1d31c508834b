"""Adapters of a model with experts: on attention and head, with peft's files; never on experts."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cli.harness import refused, write_jsonl, write_recipe
from tests.cli.test_lora import (
    MERGES,
    assert_same_answers,
    check_checkpoint_size,
    greedy,
    logits,
    losses,
    train,
)
from tests.convert.tiny import make_tiny_llama
from tests.dist.test_lora import make_adapter


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral of four experts."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("sparse") / "mixtral", family="mixtral", layers=2, hidden=32,
        heads=4, kv_heads=2, intermediate=48, num_local_experts=4, num_experts_per_tok=2,
    )


@pytest.fixture
def recipe(sections, mixtral, tmp_path):
    sections["model"]["hf"] = str(mixtral)
    sections["adapter"] = {"rank": 4, "alpha": 8}  # on all linear layers
    sections["optimizer"]["lr"] = 1e-2
    sections["evaluation"] = {"interval": "never"}
    return write_recipe(tmp_path / "recipe.yaml", **sections)


@pytest.mark.parametrize("merges", [False, True], ids=["keep", "merge"])
def test_products(recipe, mixtral, tmp_path, no_report, merges):
    """Peft says of the adapter what transformers says of hf/; experts are the start's, bitwise."""
    out = train(recipe, tmp_path / "run", **(MERGES if merges else {}))
    ours = logits(out / "hf")
    assert np.abs(ours - logits(mixtral, out / "adapter")).max() < 1e-4
    assert np.abs(ours - logits(mixtral)).max() > 1e-3
    first, second, *_ = losses(out)
    assert first != second
    check_checkpoint_size(out)
    before, after = (load_file(folder / "model.safetensors") for folder in (mixtral, out / "hf"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{a}+4"} for a in range(4)])
    assert_same_answers(*(greedy(out / name, prompts, tmp_path / f"{name}.jsonl")
                          for name in ("hf", "adapter")))


@pytest.mark.parametrize("target", ["w1", "gate", "experts"])
def test_experts_and_router_take_no_adapter(recipe, target):
    refused("train", recipe, f"adapter.targets=[q_proj,{target}]",
            named=(f"adapter.targets={target}", "there are q_proj, k_proj, v_proj, o_proj, lm_head",
                   "router and its experts"))


# peft 0.21 sets a rank pattern for experts under a name that it does not find again.
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_adapters_on_experts_that_peft_made_are_refused(recipe, mixtral, tmp_path):
    """With their path and the reason: peft's all-linear has them."""
    adapter = make_adapter(mixtral, tmp_path / "adapter", "all-linear")
    refused("train", recipe, "adapter.rank=null", "adapter.alpha=null", f"adapter.path={adapter}",
            named=(str(adapter), "target_parameters", "gate_up_proj", "target_modules"))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "1+4"}])
    refused("generate", "--model", adapter, "--prompts", prompts, "--out", tmp_path / "out",
            named=(str(adapter), "target_parameters"))
