"""Keys of an optimizer on the host: what follows from them, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from megatron_irl.config import recipe_from_mapping
from megatron_irl.errors import UserError
from megatron_irl.train.host_optimizer import DTYPES, completed, grad_buffer_fields
from megatron_irl.train.optimizer import build_optimizer_config

OFFLOAD = {"optimizer_cpu_offload": True}
FP8_WEIGHTS = {"precision": "fp8", "model": {"hf": "m", "fp8_param": True}}


def recipe(optimizer, **sections):
    mapping = {"model": {"hf": "m"}, "data": {"train": "d"}, "algorithm": {"name": "irft"},
               "output_dir": "o", "optimizer": optimizer} | sections
    return recipe_from_mapping(mapping)


def test_offloading_is_whole_and_overlapped():
    fields = completed(recipe(OFFLOAD), check_hardware=False)
    assert fields == OFFLOAD | {
        "use_precision_aware_optimizer": True, "optimizer_offload_fraction": 1.0,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }
    half = completed(recipe(OFFLOAD | {"optimizer_offload_fraction": 0.5}), check_hardware=False)
    assert half["optimizer_offload_fraction"] == 0.5


def test_megatron_takes_them():
    """The real configuration, and the dtypes as words."""
    from megatron.core.optimizer import OptimizerConfig

    words = {"main_grads_dtype": "bf16", "exp_avg_dtype": "fp32"}
    fields = completed(recipe(OFFLOAD | words), check_hardware=False)
    config = OptimizerConfig(
        bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, **fields
    )
    assert config.main_grads_dtype == torch.bfloat16
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert grad_buffer_fields(recipe(OFFLOAD | words)) == {"grad_reduce_in_fp32": False}
    assert grad_buffer_fields(recipe(OFFLOAD)) == {}


def test_without_keys_nothing_changes():
    given = {"lr": 1e-6, "optimizer": "sgd"}
    assert completed(recipe(given), check_hardware=True) == given


def test_megatron_gives_it_nothing_to_update_of_weights_in_fp8(monkeypatch):
    """Why they are refused below; when this fails, upstream has learnt it (0.19.2 has not)."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def updated(*, aware):
        weight, group = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)), {}
        places = {weight: {"param": SimpleNamespace(start=0, end=8)}}
        config = SimpleNamespace(
            fp8_recipe=None, use_precision_aware_optimizer_no_fp8_or_ds_fp8=aware)
        DistributedOptimizer._build_model_and_main_param_groups(
            [{torch.bfloat16: [{"param_map": places}]}], {weight: (0, torch.bfloat16, 0)},
            [{"params": [weight], "orig_group": group}], config)
        return [part is not None for part in group["params"]]

    assert updated(aware=True) == updated(aware=False) == [True]
    monkeypatch.setattr(DistributedOptimizer, "_is_distopt_quantized_param", lambda _: True)
    assert updated(aware=True) == [False] and updated(aware=False) == [True]


@pytest.mark.parametrize("name", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_products_in_fp8_change_nothing(name):
    """The weights are bf16, and the optimizer keeps their copies as without FP8."""
    few = recipe({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"},
                 precision="fp8", model={"hf": "m", "fp8_recipe": name})
    model = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16)
    config = build_optimizer_config(few, model, check_hardware=False)
    assert config.fp8_recipe is None and config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


@pytest.mark.parametrize(("optimizer", "sections", "named"), [
    (OFFLOAD | {"optimizer_offload_fraction": 0}, {}, "optimizer_offload_fraction=0"),
    (OFFLOAD | {"use_precision_aware_optimizer": False}, {}, "use_precision_aware_optimizer"),
    (OFFLOAD, {"precision": "fp32"}, "precision=fp32"),
    (OFFLOAD | {"optimizer": "sgd"}, {}, "optimizer.optimizer=sgd"),
    (OFFLOAD, {"generation": {"offload_optimizer": True}}, "generation.offload_optimizer"),
    ({"optimizer_offload_fraction": 0.5}, {}, "does nothing"),
    ({"exp_avg_dtype": "half"}, {}, "exp_avg_dtype=half"),
    ({"use_precision_aware_optimizer": True, "optimizer": "sgd"}, {}, "optimizer.optimizer=sgd"),
    ({"use_precision_aware_optimizer": True, "use_distributed_optimizer": False}, {},
     "optimizer.use_distributed_optimizer=false"),
    ({"use_precision_aware_optimizer": True}, {"ddp": {"use_distributed_optimizer": False}},
     "ddp.use_distributed_optimizer=false"),
    ({"use_precision_aware_optimizer": True, "fp8_recipe": "tensorwise"}, {"precision": "fp8"},
     "aware_optimizer=true conflicts with optimizer.fp8_recipe=tensorwise"),
    ({"use_precision_aware_optimizer": True}, FP8_WEIGHTS, "aware_optimizer=true.*model.fp8_param"),
    (OFFLOAD, FP8_WEIGHTS, "optimizer_cpu_offload=true conflicts with model.fp8_param=true"),
    ({"main_grads_dtype": "bf16"}, {"ddp": {"grad_reduce_in_fp32": True}}, "the same buffer"),
])
def test_refused(optimizer, sections, named):
    with pytest.raises(UserError, match=named):
        completed(recipe(optimizer, **sections), check_hardware=False)


def test_refused_on_a_cpu():
    with pytest.raises(UserError, match="running on CPU"):
        completed(recipe(OFFLOAD), check_hardware=True)


@pytest.mark.parametrize(("key", "value"), [
    ("exp_avg_dtype", "fp8"), ("exp_avg_sq_dtype", "fp16"), ("main_params_dtype", "fp16"),
])
def test_numbers_with_a_scale_are_refused_on_a_cpu(key, value):
    options = {"use_precision_aware_optimizer": True, key: value}
    with pytest.raises(UserError, match=f"{key}={value} conflicts with running on CPU"):
        completed(recipe(options), check_hardware=True)
    # Planned for elsewhere it is what is asked for.
    model = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16)
    config = build_optimizer_config(recipe(options), model, check_hardware=False)
    assert config.use_precision_aware_optimizer and getattr(config, key) == DTYPES[value]


@pytest.mark.parametrize("check_hardware", [True, False])
def test_a_plan_refuses_what_a_run_does(check_hardware):
    """Megatron's own condition: narrow moments are the precision-aware optimizer's."""
    model = SimpleNamespace(bf16=True, params_dtype=torch.bfloat16)
    with pytest.raises(UserError, match="exp_avg_dtype"):
        build_optimizer_config(recipe({"exp_avg_dtype": "bf16"}), model,
                               check_hardware=check_hardware)
