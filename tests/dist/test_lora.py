"""Adapters train as peft's do, under every layout, and come back from peft's files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_irl.convert.safe_metadata import read_metadata
from tests.convert.tiny import make_tiny_llama
from tests.dist import jobs, lora_jobs
from tests.dist.layouts import LAYOUTS, SEED, SPLIT

VOCAB, NUM_PAIRS, STEPS, LR = lora_jobs.VOCAB, 8, 5, 0.05
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")  # what a mixture has
SPARSE = {
    "mixtral": {"layers": 2, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"layers": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3,
                  "moe_intermediate_size": 32, "norm_topk_prob": True},
}
SGD = {"optimizer": "sgd", "lr": LR, "sgd_momentum": 0.0, "clip_grad": 0.0}


def make_adapter(base, folder, targets, rank=3):
    """A random adapter that peft wrote (B not zero: else the gradient of A would be)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank,
                   target_modules=targets if isinstance(targets, str) else list(targets),
                   task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    # peft adds the base's head where it is targeted; that is no part of the adapter.
    model.save_pretrained(folder, save_embedding_layers="lm_head" in targets)
    return folder


def their_logps(model, prompt, response):
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
    logprobs = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]


def peft_steps(base, adapter, pairs):
    """peft on the same pairs: (losses, gradients of the first step, matrices after the last)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=LR)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for pair in pairs:
            demo = their_logps(model, pair.prompt_ids, pair.demo_ids).sum() - pair.ref_demo_logp
            sample = (their_logps(model, pair.prompt_ids, pair.sample_ids).sum()
                      - pair.ref_sample_logp)
            total = total - torch.nn.functional.logsigmoid(jobs.BETA * (demo - sample))
        loss = total / len(pairs)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        optimizer.step()
    return losses, gradients, {name: p.detach().clone() for name, p in named.items()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """By family (model, adapter, pairs, what peft made of them)."""
    root, made = tmp_path_factory.mktemp("lora"), {}

    def make(family):
        if family not in made:
            base = make_tiny_llama(root / family, family=family, seed=SEED, vocab=VOCAB, scale=0.2,
                                   **SPARSE.get(family, {}))
            targets = ATTENTION if family in SPARSE else TARGETS
            adapter = make_adapter(base, root / f"{family}_adapter", targets)
            pairs = jobs.make_pairs(SEED, NUM_PAIRS, VOCAB)
            rng = np.random.default_rng(SEED)
            for pair in pairs:  # near what a model of this vocabulary says
                pair.ref_demo_logp = float(-5 * len(pair.demo_ids) + rng.normal())
                pair.ref_sample_logp = float(-5 * len(pair.sample_ids) + rng.normal())
            made[family] = base, adapter, pairs, peft_steps(base, adapter, pairs)
        return made[family]

    return make


@pytest.fixture(scope="module")
def setting(settings):
    """Those of a dense model."""
    return settings("llama")


@pytest.mark.parametrize(("family", "name"), [
    *(("llama", name) for name in ("one", *SPLIT)),
    *(("mixtral", name) for name in ("one", "pp2", "tp2_sp", "tp2_ep2")),
    ("qwen3_moe", "tp2_sp_pp2"),
])
def test_five_steps_equal_pefts(pool, settings, tmp_path, family, name):
    base, adapter, pairs, (losses, gradients, trained) = settings(family)
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, lora_jobs.train, hf=str(base), layout=layout, adapter={"path": str(adapter)},
        pairs=pairs, steps=STEPS, out=str(tmp_path), optimizer=SGD,
    )
    assert all(rank == ranks[0] for rank in ranks), "ranks report different numbers"
    got, scores = ranks[0]
    assert abs(got[0] - losses[0]) < 1e-6 * max(1, losses[0]), f"seed {SEED}"
    assert losses[0] - losses[-1] > 1e-3, "nothing was learnt"
    assert np.abs(np.array(got) - losses).max() < 1e-5, f"seed {SEED}"
    for folder, expected in (("gradients", gradients), ("trained", trained)):
        ours = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert ours.keys() == expected.keys()
        worst = {n: (ours[n] - expected[n]).abs().max().item() for n in ours}
        assert max(worst.values()) < 1e-5, f"seed {SEED}, {folder}: {worst}"
    assert min(g.abs().max().item() for g in gradients.values()) > 1e-4, "a gradient is nothing"
    if name in ("one", "tp2_sp", "tp2_sp_pp2"):
        check_in_peft(base, tmp_path / "trained", scores)


def load_peft(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()


def check_in_peft(base, adapter, scores, bound=1e-5):
    """What was exported says in peft what it said here."""
    model = load_peft(base, adapter)
    with torch.no_grad():
        for (prompt, response), ours in zip(
            jobs.random_sequences(11, 12, VOCAB), scores, strict=True
        ):
            difference = (their_logps(model, prompt, response).numpy() - ours).__abs__().max()
            assert difference < bound, difference


def test_round_trip_is_bitwise(pool, setting, tmp_path):
    """Read under TP2 and written again without a step, for some of the fused modules too."""
    base, whole, pairs, _ = setting
    some = make_adapter(base, tmp_path / "some", ("q_proj", "v_proj", "up_proj"), rank=5)
    for adapter in (whole, some):
        out = tmp_path / f"out_{adapter.name}"
        pool.run(
            2, lora_jobs.train, hf=str(base), layout={"tensor_model_parallel_size": 2},
            adapter={"path": str(adapter)}, pairs=pairs, steps=0, out=str(out), optimizer=SGD,
        )
        before = load_file(adapter / "adapter_model.safetensors")
        after = load_file(out / "trained" / "adapter_model.safetensors")
        before = {n: t for n, t in before.items() if ".base_layer." not in n}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        config = json.loads((out / "trained" / "adapter_config.json").read_text())
        known = json.loads((adapter / "adapter_config.json").read_text())
        for key in ("r", "lora_alpha", "peft_type", "task_type", "bias"):
            assert config[key] == known[key]
        assert set(config["target_modules"]) == set(known["target_modules"])


@pytest.mark.parametrize(("family", "name"), [("mixtral", "tp2_sp"), ("qwen3_moe", "pp2"),
                                              ("qwen3_moe", "tp2_ep2")])
def test_mixture_is_sampled_and_merged_as_peft_says(pool, settings, tmp_path, family, name):
    from transformers import AutoModelForCausalLM

    base, adapter, *_ = settings(family)
    world_size, layout = LAYOUTS[name]
    prompts = [prompt for prompt, _ in jobs.random_sequences(SEED, 4, VOCAB)]
    merged, applied = pool.run(
        world_size, lora_jobs.sample_and_export, hf=str(base), layout=layout, prompts=prompts,
        adapter={"path": str(adapter)}, out=str(tmp_path),
        sampling={"temperature": 0.0, "max_new_tokens": 12, "eos_id": 1, "seed": 3},
    )[0]
    theirs = load_peft(base, adapter)
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        for prompt, answer in zip(prompts, merged, strict=True):
            ids = torch.tensor([*prompt, *answer])[None].long()
            expected = theirs(ids).logits[0]
            assert answer == expected.argmax(-1)[len(prompt) - 1 : -1].tolist(), f"seed {SEED}"
            assert (folder(ids).logits[0] - expected).abs().max() < 1e-4
    assert applied == merged
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("family", "saved", "read"), [
    ("llama", "one", "one"), ("llama", "tp2_sp", "tp2_pp2"), ("llama", "pp2_vpp2", "tp2"),
    ("mixtral", "tp2_ep2", "pp2"),
])
def test_checkpoint_under_another_layout(pool, settings, tmp_path, family, saved, read):
    base, _, pairs, _ = settings(family)
    targets = ("all-linear", "lm_head") if family in SPARSE else TARGETS
    options = {"hf": str(base), "adapter": {"rank": 4, "targets": targets}, "pairs": pairs,
               "steps": 4, "out": str(tmp_path)}
    world_size, layout = LAYOUTS[saved]
    whole = pool.run(world_size, lora_jobs.save, layout=layout, **options)[0]
    world_size, layout = LAYOUTS[read]
    rest = pool.run(world_size, lora_jobs.resume, layout=layout, at=2, **options)[0]
    if saved == read:
        assert rest == whole[2:]
    assert np.abs(np.array(rest) - whole[2:]).max() < 1e-4
    assert whole[0] - whole[-1] > 0.01
    held = read_metadata(tmp_path / "step_000002").state_dict_metadata
    weights = [n for n, e in held.items() if hasattr(e, "size") and not n.startswith("optimizer")]
    assert weights
    assert all(".adapter.lora_" in name for name in weights), "a base weight is saved"


@pytest.mark.parametrize(("family", "options"), [
    ("gpt_neox", {"tied": False}), ("phi3", {"tied": False}), ("qwen3", {"tied": True}),
    ("gemma2", {"tied": True, "head_dim": 16, "query_pre_attn_scalar": 16}),
])
def test_families_read_and_write_pefts_adapters(pool, tmp_path, family, options):
    """Fused projections with one A, biases, tied heads, norms after: as peft says, under TP2."""
    base = make_tiny_llama(
        tmp_path / "hf", family=family, vocab=VOCAB, layers=2, scale=0.2, seed=SEED, **options
    )
    adapter = make_adapter(base, tmp_path / "adapter", "all-linear")
    _, scores = pool.run(
        2, lora_jobs.train, hf=str(base), layout={"tensor_model_parallel_size": 2},
        adapter={"path": str(adapter)}, pairs=jobs.make_pairs(SEED, 4, VOCAB), steps=0,
        out=str(tmp_path), optimizer=SGD,
    )[0]
    check_in_peft(base, adapter, scores, 1e-4)
    before, after = (load_file(f / "adapter_model.safetensors")
                     for f in (adapter, tmp_path / "trained"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
