"""What streamed conversion refuses, and that it leaves nothing behind then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.convert.checkpoint_writer import CheckpointWriter
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert import jobs
from tests.convert.test_stream import back, ignore, options_of, rename  # noqa: F401  (for ``folder``)


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """The checkpoints of two of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("mixtral", "qwen3"):
        hf_to_megatron(folder(name), root / name).run(ignore)
    return lambda name: root / name


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


@pytest.mark.parametrize(("name", "change", "said"), [
    ("qwen3", {"num_hidden_layers": 3}, "4, 64"),
    ("qwen3", {"num_hidden_layers": 5}, "in 5 layers"),
    ("qwen3", {"vocab_size": 129}, r"embedding.*\[128, 64\].*\[129, 64\]"),
    ("qwen3", {"intermediate_size": 64}, r"fc1.*\[4, 256, 64\]"),
    ("mixtral", {"num_local_experts": 7}, r"router.*\[4, 6, 64\].*\[7, 64\] in 4 layers"),
    ("mixtral", {"intermediate_size": 64}, r"fc1.*\[4, 6, 256, 64\].* in 6 experts of 4 layers"),
])
def test_checkpoint_of_another_model(folder, converted, tmp_path, name, change, said):
    other = tmp_path / "other"
    shutil.copytree(folder(name), other)
    config = json.loads((other / "config.json").read_text())
    config.pop("layer_types", None)
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        megatron_to_hf(converted(name) / "release", tmp_path / "hf", hf_dir=other)


@pytest.mark.parametrize(("change", "said"), [
    ({"experts.5.w2": None}, r"lacks model\.layers\.2\.block_sparse_moe\.experts\.5\.w2\.weight"),
    ({"experts.6.w1": (128, 64)}, r"holds model\.layers\.2\.block_sparse_moe\.experts\.6\.w1"),
    ({"experts.3.w3": (64, 64)}, r"experts\.3\.w3\.weight has shape \[64, 64\].*\[128, 64\]"),
    ({"gate": (5, 64)}, r"block_sparse_moe\.gate\.weight has shape \[5, 64\].*\[6, 64\]"),
])
def test_experts_that_do_not_fit_are_named(folder, tmp_path, change, said):
    source = shutil.copytree(folder("mixtral"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, shape in change.items():
        tensors.pop(where := f"model.layers.2.block_sparse_moe.{name}.weight", None)
        tensors |= {where: torch.zeros(shape)} if shape else {}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        hf_to_megatron(source, tmp_path / "megatron")


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
