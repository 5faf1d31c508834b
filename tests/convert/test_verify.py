"""The certificate: written when everything agrees, and missed by training where there is none."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_irl.cli.verification import Layout
from megatron_irl.convert.certificate import certificate_notes, sha256
from megatron_irl.convert.stream import hf_to_megatron, megatron_to_hf
from megatron_irl.errors import UserError
from tests.convert.test_round_trip import SPARSE
from tests.convert.test_stream import ignore
from tests.convert.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(HF folder, its distributed checkpoint, the HF folder made from that)."""
    root = tmp_path_factory.mktemp("verify")
    source = make_tiny_llama(root / "source", tied=True, vocab=131, seed=11)
    hf_to_megatron(source, root / "megatron").run(ignore)
    megatron_to_hf(root / "megatron" / "release", root / "hf", hf_dir=source).run(ignore)
    return source, root / "megatron", root / "hf"


def test_what_agrees_is_certified(models, verify, capfd, monkeypatch):
    source, megatron, hf = models
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert certificate_notes(source) == [], "nobody converted this one"
    assert "never verified" in certificate_notes(hf)[0]
    arguments = ["--hf", str(hf), "--checkpoint", str(megatron)]
    code = verify([*arguments, "--layouts", "tp2pp1", "tp3pp1"])
    said = capfd.readouterr()
    assert code == 0, said.err
    assert "tp3pp1: skipped" in said.out
    certificate = json.loads((hf / "certificate.json").read_text())
    assert certificate["bound_nats"] == 1e-4
    numbers = certificate["largest_difference_nats"]
    assert set(numbers) == {"tp2pp1"} and "tp3pp1" in certificate["skipped"]
    assert 0 < numbers["tp2pp1"]["from_transformers"] < 1e-4
    assert certificate["files"]["model.safetensors"]["sha256"] == sha256(hf / "model.safetensors")
    assert certificate["versions"]["megatron-core"]
    other = json.loads((megatron / "certificate.json").read_text())
    assert "release/.metadata" in other["files"] and "release/__0_0.distcp" in other["files"]
    assert certificate_notes(hf) == []


def test_experts_are_certified(verify_in_pool, tmp_path):
    """Under tensor parallelism the sequence is split too."""
    source = make_tiny_llama(tmp_path / "source", layers=2, seed=13, **SPARSE["mixtral"])
    hf_to_megatron(source, megatron := tmp_path / "megatron").run(ignore)
    arguments = ["--hf", str(source), "--checkpoint", str(megatron)]
    assert verify_in_pool([*arguments, "--layouts", "tp2pp1", "tp1pp2"]) == 0
    numbers = json.loads((megatron / "certificate.json").read_text())["largest_difference_nats"]
    assert set(numbers) == {"tp2pp1", "tp1pp2"}
    assert all(0 < each["from_transformers"] < 1e-4 for each in numbers.values())


def test_what_differs_is_not(models, tmp_path, capfd, verify_in_pool):
    source, megatron, _ = models
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint = tmp_path / "megatron"
    shutil.copytree(megatron, checkpoint, ignore=shutil.ignore_patterns("certificate.json"))
    code = verify_in_pool(
        ["--hf", str(other), "--checkpoint", str(checkpoint), "--layouts", "tp1pp1"])
    said = capfd.readouterr().err
    assert code == 1 and "more than the bound" in said, said
    assert "Traceback" not in said
    assert not (checkpoint / "certificate.json").exists()


def test_certificates_of_other_weights_are_noticed(models, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(models[2], hf)
    (hf / "certificate.json").write_text('{"files": {"model.safetensors": {"bytes": 3}}}')
    assert "other weights" in certificate_notes(hf)[0]
    (hf / "certificate.json").write_text("[]")
    assert "cannot be read" in certificate_notes(hf)[0]


@pytest.mark.parametrize("text", ["tp2", "2pp2", "tp0pp1", "tp2pp1vpp2", "tp-1pp1"])
def test_layouts_that_are_none(text):
    with pytest.raises(UserError, match="is no layout"):
        Layout.parse(text)
