"""LoRA adapters: merged by peft they are plain folders; unmerged, read on their base."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_irl.convert.hf_config import read_hf_config
from megatron_irl.convert.hf_folder import HfWeights
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert.test_round_trip import assert_same_weights
from tests.convert.test_stream import ignore
from tests.convert.tiny import make_tiny_llama
from tests.dist import jobs

SEED = 2477


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "llama": ({}, [*ATTENTION, "up_proj", "down_proj"]),
    "mixtral": ({"family": "mixtral", "layers": 2, "num_local_experts": 4,
                 "num_experts_per_tok": 2}, ATTENTION),
}


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, tmp_path_factory):
    """(adapter folder, merged folder, the model with its adapter beside the weights)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapter")
    options, modules = KINDS[request.param]
    base = make_tiny_llama(root / "base", seed=SEED, **options)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(SEED)
    with torch.no_grad():  # peft begins at zero, which would change nothing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(root / "adapter")
    merged = get_merged(base, root)
    return root / "adapter", merged, model.eval()


def get_merged(base, root):
    """As a user merges: load base and adapter, merge, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, root / "adapter").merge_and_unload().save_pretrained(
        root / "merged"
    )
    return root / "merged"


def test_merged_adapter_gives_the_adapted_logprobs(pool, adapted):
    _, merged, model = adapted
    (result,) = pool.run(
        1, jobs.token_logprobs, hf=str(merged), layout={}, seed=SEED, num=4, vocab=128
    )
    change = 0.0
    for got, (prompt, response) in zip(
        result, jobs.random_sequences(SEED, 4, 128), strict=True
    ):
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
        rows, targets = slice(len(prompt) - 1, -1), ids[0, len(prompt) :, None]
        with torch.no_grad():
            expected = model(ids).logits[0].log_softmax(-1)[rows].gather(1, targets)[:, 0]
            with model.disable_adapter():
                before = model(ids).logits[0].log_softmax(-1)[rows].gather(1, targets)[:, 0]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
        change = max(change, (expected - before).abs().max().item())
    assert change > 0.1, "an adapter that changes nothing would hide a lost merge"


def test_merged_adapter_converts_bitwise(adapted, tmp_path):
    _, merged, _ = adapted
    hf_to_megatron(merged, tmp_path / "megatron").run(ignore)
    megatron_to_hf(tmp_path / "megatron" / "release", tmp_path / "hf", hf_dir=merged).run(ignore)
    assert_same_weights(tmp_path / "hf", merged)


def test_unmerged_adapter_is_refused_with_the_remedy(adapted):
    adapter, _, _ = adapted
    with pytest.raises(UserError, match="adapter of peft.*adapter.path.*merge_and_unload"):
        read_hf_config(adapter)


def test_unmerged_adapter_converts_as_merged_by_peft(adapted, tmp_path, verify_in_pool):
    """From the adapter's folder alone; and Megatron's ranks read their slices so, as peft says."""
    adapter, merged, model = adapted
    hf_to_megatron(adapter, tmp_path / "megatron").run(ignore)
    megatron_to_hf(tmp_path / "megatron" / "release", tmp_path / "hf", hf_dir=merged).run(ignore)
    one, other = HfWeights(tmp_path / "hf"), HfWeights(merged)
    assert one.files.keys() == other.files.keys()
    worst = max((one.slice(n)[:] - other.slice(n)[:]).abs().max().item() for n in one.files)
    assert worst < 1e-6
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").is_file()
    if model.config.model_type == "llama":
        assert verify_in_pool(["--hf", str(adapter), "--layouts", "tp1pp1", "tp2pp1"]) == 0


def test_adapter_without_its_base_is_refused(adapted, tmp_path):
    adapter = shutil.copytree(adapted[0], tmp_path / "adapter")
    (adapter / "base.json").write_text(json.dumps({"digest": "0" * 16}))
    with pytest.raises(UserError, match="another base"):
        HfWeights(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="base_model_name_or_path=.*gone"):
        HfWeights(adapter)
