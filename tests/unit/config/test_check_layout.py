"""Layouts against ranks, batches and models."""

import dataclasses
from typing import Any

import pytest

from megatron_irl.config import (
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
    check_layout,
    check_layout_against_model,
    padded_vocab_size,
)
from megatron_irl.errors import UserError

# SmolLM2-135M: 9 heads and 3 KV heads, so that tensor parallelism can be 1 or 3.
SMOLLM: dict[str, Any] = {"num_attention_heads": 9, "num_query_groups": 3, "num_layers": 30,
                          "vocab_size": 49152, "hidden_size": 576, "ffn_hidden_size": 1536}


def layout(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, **more):
    return ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
                          virtual_pipeline_model_parallel_size=virtual, **more)


def recipe_of(parallel: ParallelConfig, micro: int = 1, batch: int = 8,
              tokens: int | None = None) -> Recipe:
    return Recipe(model=ModelConfig(hf="m"), data=DataConfig(train=("d",)),
                  algorithm=AlgorithmConfig(name="irft"), output_dir="o", parallel=parallel,
                  train=TrainConfig(micro_batch_size=micro, global_batch_size=batch,
                                    micro_batch_tokens=tokens))


@pytest.mark.parametrize(("parallel", "world_size", "expected"), [
    (layout(), 1, 1), (layout(), 8, 8), (layout(2, 2), 8, 2),
    (layout(2, context_parallel_size=2), 4, 1),
    (layout(data_parallel_size=4), None, 4),
    (layout(data_parallel_size=4), 2, 2),  # started by a launcher, the launcher decides
])
def test_data_parallel_size(parallel: ParallelConfig, world_size: int | None, expected: int):
    assert check_layout(recipe_of(parallel), world_size) == expected


@pytest.mark.parametrize(("recipe", "world_size", "message"), [
    (recipe_of(layout(2, 2)), 6,
     r"world_size=6 is not .*tensor_model_parallel_size=2 x .*takes 4 ranks. Start 4 or 8 ranks"),
    (recipe_of(layout(4)), 2, "Start 4 ranks"),
    (recipe_of(layout(), micro=3), None, "Set train.global_batch_size to 6 or 9"),
    (recipe_of(layout()), 3, r"data_parallel_size=3; .* to 6 or 9"),
    (recipe_of(layout(sequence_parallel=True)), None, "sequence_parallel=true conflicts"),
    (recipe_of(layout(expert_model_parallel_size=2)), None,
     r"expert_.*=2 conflicts with parallel.tensor_model_parallel_size=1;.* Set it to 1\.$"),
    (recipe_of(layout(4, expert_model_parallel_size=2)), None, r"Set it to 1 or 4\.$"),
    (recipe_of(layout(virtual=2)), None, "virtual_.*=2 conflicts with .*pipeline.*size=1"),
    (recipe_of(layout(pipeline=2, virtual=1)), None, "=1 is below 2"),
    (recipe_of(layout(pipeline=4, virtual=2), batch=6), None,
     r"6 microbatch\(es\).*pipeline_model_parallel_size=4;.* to 4 or 8"),
    (recipe_of(layout(), micro=2, tokens=99), None,
     "micro_batch_tokens=99 conflicts with train.micro_batch_size=2"),
    (recipe_of(layout(), tokens=99), 3, r"=8 is not a multiple of data_parallel_size=3; .* 6 or 9"),
    (recipe_of(layout(pipeline=4, virtual=2), batch=6, tokens=9), None,
     "data_parallel_size=1 x pipeline_model_parallel_size=4; .* 4 or 8"),
])
def test_layouts_refused(recipe: Recipe, world_size: int | None, message: str):
    with pytest.raises(UserError, match=message):
        check_layout(recipe, world_size)


def test_plain_pipeline_takes_any_number_of_microbatches():
    assert check_layout(recipe_of(layout(pipeline=4), batch=6), 4) == 1


@pytest.mark.parametrize("parallel", [layout(), layout(3), layout(3, 2), layout(1, 5, 3),
                                      layout(1, 2, 15)])
def test_layouts_that_fit_the_model(parallel: ParallelConfig):
    check_layout_against_model(parallel, **SMOLLM)


@pytest.mark.parametrize("vocab_size", [50257, 50259, 5])
def test_vocabularies_are_padded(vocab_size: int):
    check_layout_against_model(layout(3), **SMOLLM | {"vocab_size": vocab_size})
    padded = padded_vocab_size(vocab_size, 3)
    assert padded % 3 == 0 and 0 <= padded - vocab_size < 3


@pytest.mark.parametrize(("parallel", "changes", "message"), [
    (layout(2), {}, r"size=2 does not divide num_attention_heads=9; .* to 1 or 3\."),
    (layout(9), {}, r"size=9 does not divide num_query_groups=3; .* to 1 or 3\."),
    (layout(3), {"vocab_size": 4}, r"size=3 conflicts with vocab_size=4; .* nothing but padding"),
    (layout(3), {"ffn_hidden_size": 1000}, r"does not divide ffn_hidden_size=1000; .* to 1\."),
    (layout(1, 4), {}, r"=4 does not divide num_layers=30; .* to 1, 2, 3, 5, 6, 10, 15 or 30\."),
    (layout(1, 2, 2), {}, r"size=2 x .*virtual.*=2 does not divide num_layers=30; .* 3, 5 or 15"),
    (layout(1, 2, 7), {}, "virtual_pipeline_model_parallel_size to a divisor of 30"),
])
def test_layouts_that_do_not_fit_the_model(parallel: ParallelConfig, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        check_layout_against_model(parallel, **{**SMOLLM, **changes})


def test_the_sizes_advised_do_work():
    for tensor in (1, 2, 3, 4, 6, 8, 12):
        sizes = {**SMOLLM, "num_attention_heads": 24, "num_query_groups": 12}
        try:
            check_layout_against_model(layout(tensor), **sizes)
        except UserError as error:
            advised = str(error).rpartition(" to ")[2].rstrip(".").replace(" or ", ", ")
            assert tensor not in [int(n) for n in advised.split(", ")]
            for number in advised.split(", "):
                check_layout_against_model(layout(int(number)), **sizes)


@pytest.mark.parametrize(("tensor", "changes", "message"), [
    (1, {"hidden_size": 568}, "precision=fp8 conflicts with hidden_size=568 over 1"),
    (3, {"ffn_hidden_size": 24}, r"ffn_hidden_size=24 over 3 rank.* holds 8\. .* lower"),
])
def test_fp8_alignment(tensor: int, changes: dict, message: str):
    sizes = {**SMOLLM, **changes}
    check_layout_against_model(layout(tensor), **sizes)
    with pytest.raises(UserError, match=message):
        check_layout_against_model(layout(tensor), **sizes, precision="fp8")
    check_layout_against_model(layout(tensor), **SMOLLM, precision="fp8")


def test_model_parallel_size_counts_a_replicas_ranks():
    parallel = layout(2, 3, context_parallel_size=5)
    assert parallel.model_parallel_size == 30
    assert dataclasses.replace(parallel, data_parallel_size=7).model_parallel_size == 30


@pytest.mark.parametrize(("parallel", "experts", "message"), [
    (layout(3, expert_model_parallel_size=3), None, "=3 conflicts with a model that has no exp"),
    (layout(3), 6, "without parallel.sequence_parallel conflicts with a model of 6 experts"),
    (layout(3, expert_model_parallel_size=3, sequence_parallel=True), 8,
     "=3 does not divide num_moe_experts=8; every rank holds as many"),
])
def test_experts_that_do_not_fit_a_layout(
    parallel: ParallelConfig, experts: int | None, message: str
):
    with pytest.raises(UserError, match=message):
        check_layout_against_model(parallel, **SMOLLM, num_moe_experts=experts)


def test_whole_experts_need_not_divide():
    """A width that three ranks could not split."""
    odd = SMOLLM | {"ffn_hidden_size": 1537, "num_moe_experts": 6}
    sliced, whole = (
        layout(3, sequence_parallel=True, expert_model_parallel_size=size) for size in (1, 3)
    )
    check_layout_against_model(whole, **odd)
    with pytest.raises(UserError, match="does not divide ffn_hidden_size=1537"):
        check_layout_against_model(sliced, **odd)
