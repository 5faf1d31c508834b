"""Recipes: frozen dataclasses from YAML and dotted overrides, checked before anything is built."""

from megatron_irl.config.checks import check_recipe
from megatron_irl.config.fields import check_field_names, recipe_from_mapping
from megatron_irl.config.fingerprint import differences, fingerprint
from megatron_irl.config.hub_cache import hub_snapshot
from megatron_irl.config.layout import (
    check_layout,
    check_layout_against_model,
    padded_vocab_size,
)
from megatron_irl.config.load import load_recipe
from megatron_irl.config.open_sections import check_open_section
from megatron_irl.config.resolve import resolve, to_yaml
from megatron_irl.config.schema import (
    AdapterConfig,
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    DataSource,
    EvaluationConfig,
    GenerationConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    ProfileConfig,
    Recipe,
    ScheduleConfig,
    SplitConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "GenerationConfig",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "Precision",
    "ProfileConfig",
    "Recipe",
    "ScheduleConfig",
    "SplitConfig",
    "TrainConfig",
    "check_field_names",
    "check_layout",
    "check_layout_against_model",
    "check_open_section",
    "check_recipe",
    "differences",
    "fingerprint",
    "hub_snapshot",
    "load_recipe",
    "padded_vocab_size",
    "recipe_from_mapping",
    "resolve",
    "to_yaml",
]
