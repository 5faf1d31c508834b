"""Every family by name, and the architecture that a ``config.json`` asks for."""

import dataclasses
from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import CLASSIFIER, Architecture, Family
from megatron_irl.families.config_values import refuse
from megatron_irl.families.gemma2 import GEMMA2
from megatron_irl.families.gemma3 import GEMMA3
from megatron_irl.families.gpt_neox import GPT_NEOX
from megatron_irl.families.llama import LLAMA
from megatron_irl.families.mistral import MISTRAL
from megatron_irl.families.mixtral import MIXTRAL
from megatron_irl.families.phi3 import PHI3
from megatron_irl.families.qwen2 import QWEN2
from megatron_irl.families.qwen3 import QWEN3
from megatron_irl.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI3, GEMMA2, GEMMA3, GPT_NEOX
    )
}


def architecture(hf_config: dict[str, Any], *, reward_model: bool = False) -> Architecture:
    """Translate an HF config.

    Args:
        hf_config: The whole config.json.
        reward_model: Whether a sequence classifier with one label will do as well.

    Raises:
        UserError: An architecture, or an option in use, that is not implemented; a reward model
            where a language model is needed; a key that is missing or not a number.
    """
    name = class_name(hf_config)
    if isinstance(name, str) and name.endswith(CLASSIFIER):
        _check_reward_model(hf_config, name, wanted=reward_model)
        named = {family.classifier_name: family.name for family in FAMILIES.values()}
        if name in named:
            causal = {"architectures": [named[name]]}
            return dataclasses.replace(architecture(hf_config | causal), reward=True)
    if name not in FAMILIES:
        raise UserError(
            f"config.json: architecture {name} (model_type {hf_config.get('model_type')}) is not "
            f"supported; supported are {', '.join(FAMILIES)}."
        )
    refuse(hf_config, "quantization_config", "compression_config")
    return FAMILIES[name].read(hf_config)


def class_name(hf_config: dict[str, Any]) -> str | None:
    """The HF class of a config: as stated, else the causal language model of its ``model_type``."""
    names = hf_config.get("architectures")
    if isinstance(names, list) and names:
        return names[0]
    kinds = {family.model_type: family.name for family in FAMILIES.values()}
    return kinds.get(str(hf_config.get("model_type")))


def _check_reward_model(hf_config: dict[str, Any], name: str, *, wanted: bool) -> None:
    if not wanted:
        raise UserError(
            f"config.json: {name} is a reward model without a language-model head. Give the "
            "language model; a run that wrote hf_reward/ has it in hf/."
        )
    labels = hf_config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else hf_config.get("num_labels", 2)
    if count != 1:
        raise UserError(f"config.json: {name} has {count} labels; a reward model has one.")
