"""An adapter that a run goes on with, and what its recipe says beside it."""

import pytest

from megatron_irl.adapters.spec import adapter_spec
from megatron_irl.config import ParallelConfig
from megatron_irl.config.schema import AdapterConfig
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.errors import UserError
from tests.convert.tiny import make_tiny_llama
from tests.dist.test_lora import make_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "hf", layers=1)


def test_targets_may_be_said_in_other_words_than_the_adapters(base, tmp_path):
    """A run's own recipe says ``all-linear``; its adapter names the modules, as peft's do."""
    start = make_adapter(base, tmp_path / "adapter", [*ALL, "lm_head"])
    arch = architecture(read_hf_config(base))

    def spec(*targets):
        options = AdapterConfig(path=str(start), targets=targets)
        return adapter_spec(options, arch, ParallelConfig(), seed=0)

    assert spec("all-linear", "lm_head") == spec(*ALL, "lm_head") == spec("lm_head", *ALL)
    with pytest.raises(UserError, match="q_proj, lm_head conflicts with adapter.path.*v_proj"):
        spec("q_proj", "lm_head")
    with pytest.raises(UserError, match="w1 is no linear layer"):
        spec("w1")
