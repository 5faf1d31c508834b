"""Samples of models with soft caps: a function of their prompt, whoever shares the steps."""

import json

import pytest

import megatron_irl.hardware  # noqa: F401
from tests.convert.test_families import MODELS
from tests.convert.tiny import make_tiny_llama
from tests.unit.generation.alone import alone, check_company


@pytest.fixture(scope="module")
def capped(tmp_path_factory):
    """A tiny Gemma 2 on this process alone, every second layer with a window."""
    options = MODELS["gemma2"] | {"layers": 2, "sliding_window": 100}
    folder = make_tiny_llama(tmp_path_factory.mktemp("hf") / "tiny", **options)
    config = json.loads((folder / "config.json").read_text())
    assert config["attn_logit_softcapping"] and config["final_logit_softcapping"]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    with alone(folder) as model:
        yield model


def test_company_does_not_change_a_bit_of_a_capped_sample(capped):
    lengths = [1, 700, 20, 370, 3, 120, 385, 16, 460, 90, 33, 2]  # also past what is one piece
    check_company(capped, lengths, longest=768, places=12)
