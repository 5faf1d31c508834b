"""Advice to fill microbatches: it is faster, it fits, and there is none where it gains little."""

import pytest

from megatron_irl.planning.fuller import fuller_microbatches
from megatron_irl.planning.report import fuller_line, plan_json
from tests.examples.plans import PLANS, planned

SINGLE = ["train.micro_batch_tokens=null", "train.micro_batch_size=1"]


def plan_of(path, *overrides):
    (one, *_) = (p for p in PLANS if p.path == path)
    return one, planned(one, overrides)


@pytest.mark.parametrize("path", ["qwen_32b/recipe.yaml", "llama_70b/rft.yaml"])
def test_what_is_advised_takes_what_is_said_and_fits(path):
    one, plan = plan_of(path, *SINGLE)
    found = fuller_microbatches(plan)
    assert found is not None and found.plan.always_fits
    assert found.plan.time.total < 0.9 * plan.time.total
    again = planned(one, [*SINGLE, *found.overrides])
    assert again.time.total == pytest.approx(found.plan.time.total) and again.always_fits
    assert fuller_microbatches(again) is None
    said = fuller_line(plan, found)
    assert " ".join(found.overrides) in said and said == plan_json(plan, [], found)["advice"]


def test_a_size_that_is_there_is_named_alone():
    _, plan = plan_of("qwen_32b/recipe.yaml", "train.micro_batch_size=2",
                      "train.micro_batch_tokens=null")
    found = fuller_microbatches(plan)
    assert found is not None and found.overrides[0] == "train.micro_batch_size=1"
    _, plan = plan_of("qwen_32b/recipe.yaml", "train.micro_batch_tokens=1024")
    found = fuller_microbatches(plan)
    assert found is not None and len(found.overrides) == 1


def test_recipes_as_they_are_have_nothing_to_gain():
    for path in ("llama_8b/recipe.yaml", "llama_8b/one_gpu_full.yaml", "zephyr_irft/lora.yaml"):
        assert fuller_microbatches(plan_of(path)[1]) is None, path


def test_what_would_not_fit_is_not_advised():
    """Adam on the host leaves 10 GiB for activations: twice the tokens fit, eight times do not."""
    _, plan = plan_of("llama_8b/one_gpu_full.yaml", *SINGLE)
    found = fuller_microbatches(plan)
    assert found is not None and found.overrides == ("train.micro_batch_tokens=2400",)
    _, larger = plan_of("llama_8b/one_gpu_full.yaml", "train.micro_batch_tokens=9600")
    assert not larger.always_fits
