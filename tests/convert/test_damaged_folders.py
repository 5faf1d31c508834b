"""Model folders that are damaged or lie: refused by file and tensor, before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import data, model, recipe, sections  # noqa: F401  (fixtures)
from tests.cli.harness import refused
from tests.convert.tiny import make_tiny_llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(model, tmp_path):  # noqa: F811
    return shutil.copytree(model, tmp_path / "damaged")


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory):
    """The same kind of model in several shards with an index."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    return make_tiny_llama(path, layers=2, hidden=32, heads=4, kv_heads=2, intermediate=64,
                           max_shard_size="40KB")


@pytest.fixture
def sharded(sharded_model, tmp_path):
    copy = shutil.copytree(sharded_model, tmp_path / "damaged")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    return copy


@pytest.fixture
def refuse(recipe, tmp_path):  # noqa: F811
    """Assert that training refuses a folder in these words and claims no run folder.

    The token ids may stay: the data was right, and the next start finds them.
    """

    def check(folder, *named):
        refused("train", recipe, f"model.hf={folder}", named=named)
        assert {path.name for path in (tmp_path / "run").glob("*")} <= {"tokens"}

    return check


def change(folder, edit):
    """Rewrite the weights after ``edit(tensors)``."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_tensor(folder, refuse):
    change(folder, lambda tensors: tensors.pop(UP))
    refuse(folder, UP, "lacks", WEIGHTS)


def test_many_missing_tensors_are_counted(folder, refuse):
    change(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1." in name])
    refuse(folder, "model.layers.1.", "and 6 more tensors")


def test_surplus_tensor(folder, refuse):
    change(folder, lambda tensors: tensors.update({"model.layers.2.bias": torch.zeros(3)}))
    refuse(folder, "model.layers.2.bias", "not imply", WEIGHTS)


def test_wrong_shape(folder, refuse):
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(65, 32)}))
    refuse(folder, UP, "[65, 32]", "[64, 32]", WEIGHTS)


def test_transposed_square_matrix_of_other_size(folder, refuse):
    change(folder, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
    refuse(folder, UP, "[32, 64]")


def test_integer_weights(folder, refuse):
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(64, 32, dtype=torch.int8)}))
    refuse(folder, UP, "I8", "Dequantize")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_weights(folder, refuse, value):
    change(folder, lambda tensors: tensors[UP][3, 5:6].fill_(value))
    refuse(folder, UP, "NaN or infinite", WEIGHTS)


def test_number_too_large_for_the_precision(folder, refuse):
    def enlarge(tensors):
        tensors[UP] = tensors[UP].double()
        tensors[UP][0, 0] = 1e300  # infinite as float32

    change(folder, enlarge)
    refuse(folder, UP, "float32")


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.3, 0.999])
def test_truncated_file(folder, refuse, kept):
    path = folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refuse(folder, WEIGHTS, "damaged", "Copy it again")


def test_garbage_file(folder, refuse):
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)
    refuse(folder, WEIGHTS, "damaged")


def test_pointer_instead_of_weights(folder, refuse):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse(folder, WEIGHTS, "Git LFS pointer")


def test_no_weights_but_pickled_ones(folder, refuse):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refuse(folder, "pytorch_model.bin", "save_pretrained")


def test_no_weights(folder, refuse):
    (folder / WEIGHTS).unlink()
    refuse(folder, WEIGHTS, INDEX)


def test_missing_shard(sharded, refuse):
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    refuse(sharded, lost.name, "does not exist", INDEX)


def test_truncated_shard(sharded, refuse):
    torn = sorted(sharded.glob("model-*.safetensors"))[-1]
    torn.write_bytes(torn.read_bytes()[:-10])
    refuse(sharded, torn.name, "damaged")


def edit_index(folder, edit):
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_that_places_a_tensor_elsewhere(sharded, refuse):
    def move(places):
        places[UP] = next(file for file in sorted(places.values()) if file != places[UP])

    edit_index(sharded, move)
    refuse(sharded, UP, "does not hold it", INDEX)


def test_index_that_names_a_tensor_nobody_has(sharded, refuse):
    edit_index(sharded, lambda places: places.update({"model.extra": next(iter(places.values()))}))
    refuse(sharded, "model.extra", "does not hold it")


def test_index_that_forgets_a_tensor_does_no_harm(sharded):
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.load import validate_hf_folder

    edit_index(sharded, lambda places: places.pop(UP))
    validate_hf_folder(sharded, architecture(read_hf_config(sharded)))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_none(sharded, refuse, text):
    (sharded / INDEX).write_text(text)
    refuse(sharded, INDEX)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_that_is_none(folder, refuse, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json", "JSON")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", None), ("num_hidden_layers", 0), ("vocab_size", "many"),
     ("num_attention_heads", 3), ("num_key_value_heads", 3), ("rms_norm_eps", -1.0)],
)
def test_config_value_that_makes_no_sense(folder, refuse, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    refuse(folder, "config.json", key)


def test_config_of_a_deeper_model(folder, refuse):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuse(folder, "lacks", "model.layers.2.")


def test_tied_head_that_differs(folder, refuse):
    """The config says tied, the file holds another head: neither wins."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refuse(folder, "lm_head.weight", "tie_word_embeddings")
