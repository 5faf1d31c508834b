"""The planner's terms against what real runs of small layouts allocate, rank by rank."""


import pytest

from megatron_irl import hardware
from megatron_irl.config import recipe_from_mapping, resolve
from megatron_irl.convert.hf_config import architecture
from megatron_irl.planning.machines import MACHINES
from megatron_irl.planning.plan import make_plan
from megatron_irl.planning.workload import Lengths
from tests.planning.real_run import measured

pytestmark = pytest.mark.skipif(hardware.IS_CUDA, reason="counts the CPU's allocator")

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "one": (1, {}),
    "tp2+sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2+vpp2": (2, {"pipeline_model_parallel_size": 2,
                     "virtual_pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}
TOKENS, MICRO, BATCH, ROWS = 256, 2, 8, 64

MIXTRAL = CONFIG | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 192,
    "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 3,
}
SLICES = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OF_EXPERTS = {
    "one": (1, {}), "slices": (2, SLICES),
    "whole": (2, SLICES | {"expert_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.mark.parametrize("model", [{}, FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_terms(pool, name, model):
    """Weights, gradients and moments exactly (but for the buffers' padding), a step within 10 %."""
    check(pool, CONFIG, *LAYOUTS[name], model, dp=2 if name == "dp2" else 1)


@pytest.mark.parametrize(("name", "model"), [
    ("one", {}), ("one", MOE), ("one", FULL), ("slices", {}), ("slices", MOE), ("whole", {}),
    ("whole", FULL), ("pp2", {}),
])
def test_terms_of_a_mixture(pool, name, model):
    """Likewise, of real routers, which give experts unequal numbers of tokens."""
    check(pool, MIXTRAL, *OF_EXPERTS[name], model)


def check(pool, hf_config, ranks, layout, model, *, dp=1):
    """A step's terms of every rank against the plan's."""
    found = pool.run(ranks, measured, hf_config=hf_config, layout=layout, model=model,
                     tokens=TOKENS, pairs=BATCH, micro=MICRO, rows_at_once=ROWS)
    recipe = resolve(recipe_from_mapping({
        "model": {"hf": "x"} | model, "output_dir": "z", "precision": "fp32", "parallel": layout,
        "data": {"train": "y", "max_prompt_length": TOKENS, "max_response_length": TOKENS},
        "algorithm": {"name": "irft", "steps_per_round": 1},
        "train": {"micro_batch_size": MICRO, "global_batch_size": BATCH,
                  "logprob_rows": ROWS},
    }), 100)
    lengths = Lengths.equal(3 * TOKENS // 4, TOKENS // 4, 100, "equal")
    plan = make_plan(recipe, architecture(hf_config), MACHINES["h100"], lengths,
                     data_parallel_size=dp)
    for rank, real in enumerate(found):
        stage = plan.stages[rank if layout.get("pipeline_model_parallel_size") else 0]
        terms = stage.terms
        assert real["weights"] == terms["weights"]
        for term in ("gradients", "optimizer"):
            assert real[term] == pytest.approx(terms[term], rel=0.01)
        step = terms["activations"] + terms["logits"] + terms["backward"]
        assert step == pytest.approx(real["step"], rel=0.10), (rank, step / real["step"])
