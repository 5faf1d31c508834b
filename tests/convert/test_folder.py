"""Damaged and mismatched folders: each refused from its headers, naming tensor and file."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.convert.hf_folder import INDEX, SINGLE, HfWeights, validate_hf_folder
from megatron_irl.errors import UserError
from tests.convert.tiny import make_tiny_llama

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("folder") / "hf", layers=2, seed=5)


@pytest.fixture
def whole(source, tmp_path):
    """A fresh copy in one file, and its tensors."""
    return _copy(source, tmp_path / "one", {SINGLE: list(load_file(source / SINGLE))})


@pytest.fixture
def sharded(source, tmp_path):
    """A fresh copy in two shards with an index."""
    names = sorted(load_file(source / SINGLE))
    return _copy(source, tmp_path / "two", {"a.safetensors": names[:9], "b.safetensors": names[9:]})


def _copy(source: Path, folder: Path, files: dict[str, list[str]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / SINGLE)
    for file, names in files.items():
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        _write_index(folder, {n: file for file, names in files.items() for n in names})
    return folder


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def _change(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / SINGLE) | change
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / SINGLE)


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        validate_hf_folder(folder, architecture(read_hf_config(folder)))
    return str(caught.value)


def test_whole_folders_pass(whole, sharded):
    for folder in (whole, sharded):
        validate_hf_folder(folder, architecture(read_hf_config(folder)))


def test_missing_tensor(whole):
    _change(whole, {GATE: None})
    message = _refusal(whole)
    assert GATE in message and str(whole) in message and SINGLE in message


def test_surplus_tensor(whole):
    _change(whole, {"model.layers.2.mlp.gate_proj.weight": torch.zeros(2, 2)})
    message = _refusal(whole)
    assert "model.layers.2.mlp.gate_proj.weight" in message and str(whole / SINGLE) in message


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_known_buffers_are_no_surplus(whole, name):
    _change(whole, {name: torch.zeros(4)})
    validate_hf_folder(whole, architecture(read_hf_config(whole)))


def test_head_of_an_untied_model_is_not_redundant(whole):
    _change(whole, {"lm_head.weight": None})
    assert "lm_head.weight" in _refusal(whole)


@pytest.mark.parametrize("shape", [(64, 128), (128,), (128, 64, 1)])
def test_wrong_shape(whole, shape):
    _change(whole, {GATE: torch.zeros(shape)})
    message = _refusal(whole)
    assert GATE in message and str(whole / SINGLE) in message
    assert str(list(shape)) in message and "[128, 64]" in message


def test_integer_weights(whole):
    _change(whole, {GATE: torch.zeros(128, 64, dtype=torch.int8)})
    message = _refusal(whole)
    assert GATE in message and "I8" in message and SINGLE in message


@pytest.mark.parametrize("lost_bytes", [1, 5000])
def test_truncated_file(whole, lost_bytes):
    path = whole / SINGLE
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(content[:-lost_bytes])
    message = _refusal(whole)
    assert str(path) in message and (last in message or "more tensors" in message)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\0" * 64, b"\xff" * 64, struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 9) + b'{"a":[1]}'],
)
def test_garbage_instead_of_a_file(whole, content):
    (whole / SINGLE).write_bytes(content)
    assert str(whole / SINGLE) in _refusal(whole)


def test_lfs_pointer(whole):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (whole / SINGLE).write_text(pointer)
    message = _refusal(whole)
    assert str(whole / SINGLE) in message and "git lfs pull" in message


def test_missing_shard(sharded):
    (sharded / "b.safetensors").unlink()
    message = _refusal(sharded)
    lost = {n for n, f in _weight_map(sharded).items() if f == "b.safetensors"}
    assert "b.safetensors" in message and any(name in message for name in lost)


def test_truncated_shard(sharded):
    path = sharded / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert str(path) in _refusal(sharded)


def test_index_that_places_a_tensor_in_another_shard(sharded):
    weight_map = _weight_map(sharded)
    name = next(n for n, f in weight_map.items() if f == "a.safetensors")
    _write_index(sharded, weight_map | {name: "b.safetensors"})
    message = _refusal(sharded)
    assert name in message and "b.safetensors" in message


def test_index_that_forgets_a_tensor_is_mended_from_the_headers(sharded):
    weight_map = _weight_map(sharded)
    _write_index(sharded, {n: f for n, f in weight_map.items() if n != GATE})
    assert HfWeights(sharded).files == weight_map
    validate_hf_folder(sharded, architecture(read_hf_config(sharded)))


@pytest.mark.parametrize("weight_map", [["a"], "a", None, {GATE: 3}, {GATE: None}, {GATE: [1]}])
def test_malformed_index(sharded, weight_map):
    _write_index(sharded, weight_map)
    assert INDEX in _refusal(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_index_that_is_not_one(sharded, text):
    (sharded / INDEX).write_text(text)
    assert INDEX in _refusal(sharded)


def test_pickled_weights_get_advice(whole):
    (whole / SINGLE).rename(whole / "pytorch_model.bin")
    message = _refusal(whole)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_no_weights_at_all(whole):
    (whole / SINGLE).unlink()
    assert SINGLE in _refusal(whole) and str(whole) in _refusal(whole)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_config_that_is_not_one(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        read_hf_config(tmp_path)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        read_hf_config(tmp_path / "nowhere")
