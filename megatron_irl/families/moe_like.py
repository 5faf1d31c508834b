"""What mixtures of experts share: every MLP is a router and experts of one width."""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.config_values import size
from megatron_irl.families.llama_like import LLAMA_ROWS
from megatron_irl.families.rows import EXPERT, LAYER, Row, hf
from megatron_irl.families.tensors import GateUp, Replicated, Split


def moe_rows(prefix: str, *, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Llama's rows with experts in place of the MLP.

    Args:
        prefix: What HF calls the mixture in a layer: ``mlp``.
        gate, up, down: What it calls the three matrices of an expert.
    """
    layer = f"model.layers.{{}}.{prefix}."
    expert = layer + "experts.{}."
    experts = (
        Row(LAYER + "mlp.router.weight", Replicated(),
            (hf(layer + "gate.weight", "experts", "hidden"),)),
        Row(EXPERT + "linear_fc1.weight", GateUp(),
            (hf(f"{expert}{gate}.weight", "ffn", "hidden"),
             hf(f"{expert}{up}.weight", "ffn", "hidden"))),
        Row(EXPERT + "linear_fc2.weight", Split(1),
            (hf(f"{expert}{down}.weight", "hidden", "ffn"),)),
    )
    rows: list[Row] = []
    for row in LLAMA_ROWS:
        if row.megatron.startswith(LAYER + "mlp.linear_fc1.weight"):
            rows += experts
        elif not row.megatron.startswith(LAYER + "mlp."):
            rows.append(row)
    return tuple(rows)


def moe_fields(
    hf_config: dict[str, Any], *, count: str, width: str, normalized: bool
) -> dict[str, Any]:
    """TransformerConfig fields of a mixture in every layer.

    Args:
        count, width: The keys of config.json with the number of experts and the width of one.
        normalized: Whether the weights of the chosen experts add up to one.

    Raises:
        UserError: A number that is missing, or more experts a token than there are.
    """
    experts, chosen = size(hf_config, count), size(hf_config, "num_experts_per_tok")
    if chosen > experts:
        raise UserError(
            f"config.json: num_experts_per_tok={chosen} conflicts with {count}={experts}; a token "
            "cannot go to more experts than there are."
        )
    ffn = size(hf_config, width)
    return {
        "num_moe_experts": experts,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": ffn,
        # No layer has another MLP, so this is the width of every one.
        "ffn_hidden_size": ffn,
        "moe_router_score_function": "softmax",
        # A softmax over the chosen logits is the softmax over all, normalised over the chosen.
        "moe_router_pre_softmax": not normalized,
    }
