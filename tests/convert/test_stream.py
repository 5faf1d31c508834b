"""Streamed conversion: what Megatron reads is what it wrote, and the way back is bitwise."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.convert.checkpoint_writer import CheckpointWriter
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert import jobs
from tests.convert.test_round_trip import LAYOUTS, assert_same_weights, weights
from tests.convert.tiny import make_tiny_llama

SEED = int(np.random.SeedSequence().entropy % 2**31)
MODELS = {
    "llama_tied_odd": {"tied": True, "vocab": 131, "kv_heads": 2},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "gpt_neox": {"family": "gpt_neox", "scale": 0.25},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2", "head_dim": 16, "tied": True},
    "gemma3": {"family": "gemma3_text", "head_dim": 16, "tied": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models by name, each made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_llama(root / name, layers=4, seed=SEED, **MODELS[name])
        return made[name]

    return make


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


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n not in ("tp4", "pp2_dp2")])
@pytest.mark.parametrize("name", ["llama_tied_odd", "phi3", "gemma3", "gpt_neox"])
def test_megatron_reads_it_under_every_layout(pool, folder, converted, name, layout):
    world_size, sizes = LAYOUTS[layout]
    differing = pool.run(
        world_size, jobs.load_equals, hf=str(folder(name)), layout=sizes,
        checkpoint=str(converted(name) / "release"),
    )
    assert differing == [[]] * world_size


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2_vpp2", "tp2_pp2"])
def test_what_megatron_wrote_is_read_back_bitwise(pool, folder, tmp_path, layout):
    world_size, sizes = LAYOUTS[layout]
    source = folder("llama_tied_odd")
    pool.run(world_size, jobs.save_checkpoint, hf=str(source), layout=sizes,
             out=str(tmp_path / "saved"))
    assert_same_weights(back(tmp_path / "saved", tmp_path / "hf", source), source)


def test_checkpoint_of_a_run(pool, folder, tmp_path):
    """Trained at TP2, with optimizer state beside the weights; read elsewhere and as HF."""
    world_size, sizes = LAYOUTS["tp2"]
    source = folder("llama_tied_odd")
    pool.run(world_size, jobs.save_training, hf=str(source), layout=sizes,
             folder=str(tmp_path / "run"), export=str(tmp_path / "export"))
    checkpoint = tmp_path / "run" / "step_000001"
    out = back(checkpoint, tmp_path / "hf", source)
    assert_same_weights(out, tmp_path / "export")
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(weights(out)[name], weights(source)[name]), "nothing was learnt"
    scores = {}
    for layout in ("tp2", "pp2", "dp2"):
        world_size, sizes = LAYOUTS[layout]
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


def test_norms_fused_or_not(pool, folder, converted, tmp_path):
    """Transformer Engine's spec stores a norm in the linear layer after it, others by itself."""
    source, plain = folder("gpt_neox"), tmp_path / "plain"
    shutil.copytree(converted("gpt_neox") / "release", plain)
    qkv = "self_attention.linear_qkv.layer_norm_"
    assert rename(plain, qkv, "input_layernorm.") == 2  # weight and bias
    assert rename(plain, "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.") == 2
    assert_same_weights(back(plain, tmp_path / "hf", source), source)
    (differing,) = pool.run(
        1, jobs.load_equals, hf=str(source), layout={}, checkpoint=str(plain)
    )
    assert differing == []


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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_not_finite_weights_are_named_and_leave_nothing(folder, tmp_path, value):
    source = tmp_path / "source"
    shutil.copytree(folder("qwen3"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][1, 1] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinite.*layers\.2\.self_attn\.k_proj"):
        hf_to_megatron(source, tmp_path / "megatron").run(ignore)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_tied_head_that_differs(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder("llama_tied_odd"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        hf_to_megatron(source, tmp_path / "megatron").run(ignore)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "file gone": (lambda c: (c / "__2_0.distcp").unlink(), "__2_0.distcp"),
    "file cut": (lambda c: truncate(c / "__2_0.distcp"), "__2_0.distcp"),
    "file empty": (lambda c: (c / "__2_0.distcp").write_bytes(b""), "__2_0.distcp"),
    "file of zeros": (lambda c: (c / "__2_0.distcp").write_bytes(bytes(200_000)), "__2_0.distcp"),
    "metadata gone": (lambda c: (c / ".metadata").unlink(), ".metadata is missing"),
    "metadata cut": (lambda c: truncate(c / ".metadata"), ".metadata is missing or damaged"),
    "metadata empty": (lambda c: (c / ".metadata").write_bytes(b""), ".metadata is missing"),
    "tensor renamed": (lambda c: rename(c, "linear_proj", "linear_x"), "lacks decoder.layers.0"),
    "no model": (lambda c: rename(c, "decoder.", "x."), "does not hold a GPTModel"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(folder, converted, tmp_path, damage):
    checkpoint = tmp_path / "damaged"
    shutil.copytree(converted("qwen3") / "release", checkpoint)
    harm, said = DAMAGES[damage]
    harm(checkpoint)
    with pytest.raises(UserError) as caught:
        back(checkpoint, tmp_path / "hf", folder("qwen3"))
    assert said in str(caught.value) and str(checkpoint) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_hidden_layers": 3}, "4, 64"), ({"num_hidden_layers": 5}, "in 5 layers"),
     ({"vocab_size": 129}, r"embedding.*\[128, 64\].*\[129, 64\]"),
     ({"intermediate_size": 64}, r"fc1.*\[4, 256, 64\]")],
)
def test_checkpoint_of_another_model(folder, converted, tmp_path, change, said):
    other = tmp_path / "other"
    shutil.copytree(folder("qwen3"), other)
    config = json.loads((other / "config.json").read_text())
    config.pop("layer_types")
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        megatron_to_hf(converted("qwen3") / "release", tmp_path / "hf", hf_dir=other)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [("llama_tied_odd", None, "is of another model"), ("qwen3", "file cut", "is damaged")],
)
def test_megatrons_own_loader_refuses(pool, folder, converted, tmp_path, name, damage, said):
    checkpoint = tmp_path / "copy"
    shutil.copytree(converted("qwen3") / "release", checkpoint)
    if damage:
        DAMAGES[damage][0](checkpoint)
    (message,) = pool.run(
        1, jobs.load_megatron_message, hf=str(folder(name)), checkpoint=str(checkpoint)
    )
    assert said in message and str(checkpoint) in message


def test_a_disk_that_is_too_small_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB"):
        hf_to_megatron(folder("qwen3"), tmp_path / "megatron")


def test_not_finite_weights_in_a_checkpoint(folder, tmp_path):
    arch = architecture(read_hf_config(folder("qwen3")))
    bad = "decoder.layers.1.mlp.linear_fc2.weight"

    def read(row):
        return torch.full(row.shape(arch), float("nan") if row.megatron == bad else 1.0)

    (tmp_path / "diverged").mkdir()
    writer = CheckpointWriter(tmp_path / "diverged", arch, lambda row: torch.float32)
    for group in range(len(writer.groups)):
        writer.write(group, read)
    writer.finish()
    with pytest.raises(UserError, match=f"NaN or infinite weights: {bad}"):
        back(tmp_path / "diverged", tmp_path / "hf", folder("qwen3"))
    assert [p.name for p in tmp_path.iterdir()] == ["diverged"]
