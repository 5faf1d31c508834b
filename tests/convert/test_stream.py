"""Streamed conversion: what Megatron reads is what it wrote, and the way back is bitwise."""

import itertools
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.convert.megatron_folder import adapt_to_spec
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from tests.convert import jobs
from tests.convert.test_round_trip import (
    LAYOUTS,
    SPARSE,
    assert_same_weights,
    layout_of,
    weights,
)

SEED = int(np.random.SeedSequence().entropy % 2**31)
MODELS = {
    "llama_tied_odd": {"tied": True, "vocab": 131, "kv_heads": 2},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "gpt_neox": {"family": "gpt_neox", "scale": 0.25},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2", "head_dim": 16, "tied": True},
    "gemma3": {"family": "gemma3_text", "head_dim": 16, "tied": True},
} | SPARSE


def options_of(name):
    """What a model is made with, for ``folder``."""
    return {"seed": SEED, **MODELS[name]}


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """Their distributed checkpoints, likewise."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = root / name
            hf_to_megatron(folder(name), made[name]).run(ignore)
        return made[name]

    return make


def ignore(label: str, nbytes: int) -> None:
    pass


def back(checkpoint: Path, out: Path, hf: Path, **options) -> Path:
    megatron_to_hf(checkpoint, out, hf_dir=hf, **options).run(ignore)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(folder, converted, tmp_path, name):
    source = folder(name)
    out = back(converted(name) / "release", tmp_path / "hf", converted(name) / "hf",
               max_shard_bytes=60_000)
    assert_same_weights(out, source)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(out).values())
    for file in ("tokenizer.json", "config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_every_tensor_keeps_its_own_dtype(folder, tmp_path):
    source = tmp_path / "mixed"
    shutil.copytree(folder("qwen3"), source)
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron").run(ignore)
    out = back(tmp_path / "megatron" / "release", tmp_path / "hf", source)
    assert_same_weights(out, source)
    hf_to_megatron(source, tmp_path / "wide", dtype=torch.float32).run(ignore)
    narrow = back(tmp_path / "wide" / "release", tmp_path / "bf16", source, dtype=torch.bfloat16)
    assert {t.dtype for t in weights(narrow).values()} == {torch.bfloat16}
    assert all(torch.equal(t, tensors[n].bfloat16()) for n, t in weights(narrow).items())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(narrow)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(("name", "layout"), [
    *itertools.product(
        ["llama_tied_odd", "phi3", "gemma3", "gpt_neox"],
        [layout for layout in LAYOUTS if layout not in ("tp4", "pp2_dp2")],
    ),
    ("mixtral", "tp2_pp2"), ("qwen3_moe", "tp2_ep2"),
])
def test_megatron_reads_it_under_every_layout(pool, folder, converted, name, layout):
    world_size, sizes = layout_of(name, layout)
    differing = pool.run(
        world_size, jobs.load_equals, hf=str(folder(name)), layout=sizes,
        checkpoint=str(converted(name) / "release"),
    )
    assert differing == [[]] * world_size


@pytest.mark.parametrize(("name", "layout"), [
    *itertools.product(["llama_tied_odd"], ["dp2", "tp2", "pp2_vpp2", "tp2_pp2"]),
    ("mixtral", "tp2_pp2"), ("qwen3_moe", "tp2_ep2"),
])
def test_what_megatron_wrote_is_read_back_bitwise(pool, folder, tmp_path, name, layout):
    world_size, sizes = layout_of(name, layout)
    source = folder(name)
    pool.run(world_size, jobs.save_checkpoint, hf=str(source), layout=sizes,
             out=str(tmp_path / "saved"))
    assert_same_weights(back(tmp_path / "saved", tmp_path / "hf", source), source)


@pytest.mark.parametrize(("name", "learnt"), [
    ("llama_tied_odd", "mlp.up_proj"), ("qwen3_moe", "mlp.experts.5.up_proj"),
])
def test_checkpoint_of_a_run(pool, folder, tmp_path, name, learnt):
    """Trained at TP2, with optimizer state beside the weights; read elsewhere and as HF."""
    world_size, sizes = layout_of(name, "tp2")
    source = folder(name)
    pool.run(world_size, jobs.save_training, hf=str(source), layout=sizes,
             folder=str(tmp_path / "run"), export=str(tmp_path / "export"))
    checkpoint = tmp_path / "run" / "step_000001"
    out = back(checkpoint, tmp_path / "hf", source)
    assert_same_weights(out, tmp_path / "export")
    tensor = f"model.layers.1.{learnt}.weight"
    assert not torch.equal(weights(out)[tensor], weights(source)[tensor]), "nothing was learnt"
    scores = {}
    for layout in ("tp2", "pp2", "dp2"):
        world_size, sizes = layout_of(name, layout)
        ranks = pool.run(
            world_size, jobs.checkpoint_logprobs, hf=str(source), layout=sizes, vocab=128,
            checkpoint=str(checkpoint), seed=SEED, num=6,
        )
        assert all(rank == ranks[0] for rank in ranks)
        scores[layout] = np.concatenate(ranks[0])
    np.testing.assert_allclose(scores["pp2"], scores["tp2"], atol=1e-5, err_msg=f"seed {SEED}")
    np.testing.assert_allclose(scores["dp2"], scores["tp2"], atol=1e-5, err_msg=f"seed {SEED}")
    assert np.std(scores["tp2"]) > 0.3


def rename(checkpoint: Path, old: str, new: str) -> int:
    """Rename tensors in a checkpoint's metadata; returns how many."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entries = metadata.state_dict_metadata
    count = sum(old in name for name in entries)
    metadata.state_dict_metadata = {n.replace(old, new): e for n, e in entries.items()}
    metadata.storage_data = {
        type(index)(index.fqn.replace(old, new), index.offset, index.index): info
        for index, info in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    return count


@pytest.mark.parametrize(("name", "other_way"), [("gpt_neox", False), ("mixtral", True)])
def test_norms_fused_or_not(pool, folder, converted, tmp_path, name, other_way):
    """Transformer Engine's spec stores a norm in the linear layer after it, others by itself; that
    before experts it stores by itself, and Megatron's own local spec as if it were fused.
    """
    source, plain = folder(name), tmp_path / "plain"
    shutil.copytree(converted(name) / "release", plain)
    tensors = 1 if other_way else 2  # weight and bias
    qkv = "self_attention.linear_qkv.layer_norm_"
    assert rename(plain, qkv, "input_layernorm.") == tensors
    names = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    assert rename(plain, *(reversed(names) if other_way else names)) == tensors
    assert_same_weights(back(plain, tmp_path / "hf", source), source)
    (differing,) = pool.run(
        1, jobs.load_equals, hf=str(source), layout={}, checkpoint=str(plain)
    )
    assert differing == []


def test_layers_with_names_of_their_own(pool, folder, tmp_path):
    """Megatron can store layers apart; the experts of one are a tensor all the same."""
    world_size, sizes = layout_of("qwen3_moe", "tp2_pp2")
    source, saved = folder("qwen3_moe"), tmp_path / "saved"
    pool.run(world_size, jobs.save_checkpoint, hf=str(source), layout=sizes, out=str(saved),
             non_homogeneous_layers=True)
    entry = read_metadata(saved).state_dict_metadata[
        "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"]
    assert entry.size == (8, 64, 32)
    assert_same_weights(back(saved, tmp_path / "hf", source), source)


def test_extra_state_of_every_expert_is_left_alone(converted):
    """A module of Transformer Engine's for many experts has one for each."""
    entries = {
        f"decoder.layers.0.mlp.experts.linear_fc1.{name}": SimpleNamespace(
            key=(key := f"decoder.layers.mlp.experts.experts.linear_fc1.{stored}"), unique_key=key)
        for name, stored in (("weight0", "weight"), ("weight1", "weight"),
                             ("_extra_state", "_extra_state"), ("_extra_state1", "_extra_state"))
    }
    adapt_to_spec({"model0": entries}, converted("qwen3_moe") / "release")
    assert [name.rpartition(".")[2] for name in entries] == ["weight0", "weight1"]


@pytest.mark.parametrize("extra_when_saving", [True, False])
def test_runs_resume_across_specs(pool, folder, tmp_path, extra_when_saving):
    """Extra state that only one of the specs has neither stops a resume nor is made up."""
    ((differing, restored),) = pool.run(
        1, jobs.resume_across_specs, hf=str(folder("qwen3")), folder=str(tmp_path),
        extra_when_saving=extra_when_saving,
    )
    assert differing == [] and not restored


class Killed(BaseException):
    """Stands for a signal: the code gets no chance to clean up after itself."""


def kill_after(groups: int):
    done = []

    def progress(label: str, nbytes: int) -> None:
        done.append(label)
        if len(done) == groups:
            raise Killed

    return progress


@pytest.mark.parametrize("groups", [1, 3])
def test_a_killed_conversion_goes_on(folder, converted, tmp_path, groups):
    source, there, out = folder("qwen3"), tmp_path / "megatron", tmp_path / "hf"
    with pytest.raises(Killed):
        hf_to_megatron(source, there).run(kill_after(groups))
    assert not there.exists()
    unfinished = tmp_path / ".megatron.partial" / "release"
    before = {p.name: p.stat().st_mtime_ns for p in unfinished.glob("*.distcp")}
    hf_to_megatron(source, there).run(ignore)
    after = {p.name: p.stat().st_mtime_ns for p in (there / "release").glob("*.distcp")}
    assert len(before) == groups and before.items() <= after.items(), "written again"
    with pytest.raises(Killed):
        back_killed = megatron_to_hf(there / "release", out, hf_dir=source)
        back_killed.run(kill_after(groups))
    read = []
    megatron_to_hf(there / "release", out, hf_dir=source).run(lambda label, _: read.append(label))
    assert len(read) == 6  # embedding, layers, head
    assert_same_weights(out, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "megatron"]


def test_a_changed_source_starts_over(folder, tmp_path):
    source, there = tmp_path / "source", tmp_path / "megatron"
    shutil.copytree(folder("qwen3"), source)
    with pytest.raises(Killed):
        hf_to_megatron(source, there).run(kill_after(3))
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, there).run(ignore)
    assert_same_weights(back(there / "release", tmp_path / "hf", source), source)
