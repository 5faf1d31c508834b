"""What a mixture of experts adds to Megatron's configuration, and what of it is refused."""

from typing import Any

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture

# What would make a token's answer, or a step's gradient, depend on what it is computed with; and
# what would make the folder's weights another model.
REFUSED = {
    "expert_model_parallel_size": "parallel.expert_model_parallel_size says it",
    "expert_tensor_parallel_size": "it follows from parallel.expert_model_parallel_size",
    "moe_aux_loss_coeff": "its loss depends on how a batch is split into microbatches",
    "moe_z_loss_coeff": "its loss depends on how a batch is split into microbatches",
    "moe_input_jitter_eps": "samples and their log-probabilities would be of different numbers",
    "moe_expert_capacity_factor": "which tokens are dropped depends on the others in the batch",
    "moe_pad_expert_input_to_capacity": "which tokens are dropped depends on the others",
    "moe_pad_experts_for_cuda_graph_inference": "small steps are captured without it, and training "
    "would go on with its capacity",
    "moe_router_force_load_balancing": "tokens would go to experts by chance",
    "moe_router_force_biased": "tokens would go to other experts than the router says",
    "moe_router_num_groups": "the routers here choose among all experts",
    "moe_router_group_topk": "the routers here choose among all experts",
    "moe_router_topk_scaling_factor": "no family here scales what the router says",
    "moe_router_enable_expert_bias": "no family here has such a bias",
    "moe_mlp_glu_interleave_size": "no family here interleaves gate and up projections",
    "moe_apply_probs_on_input": "the families here weight what experts give, not what they get",
    "moe_shared_expert_intermediate_size": "no family here has shared experts",
    "moe_latent_size": "no family here has latent experts",
    "moe_single_grouped_weight": "it makes one weight of all experts', and folders are read and "
    "written by those of each",
    "moe_single_grouped_bias": "no family here has experts with biases",
    "use_transformer_engine_op_fuser": "its products pass by the modules of the experts, and none "
    "of them was ever compared with the folder's model",
    "moe_upcycling_granularity": "the weights are the folder's",
    "mtp_num_layers": "no family here predicts more than one token",
}
DISPATCHER, BALANCING = "moe_token_dispatcher_type", "moe_router_load_balancing_type"


def mixture_fields(
    architecture: Architecture, overrides: dict[str, Any], *, grouped: bool
) -> dict[str, Any]:
    """TransformerConfig fields of a model with experts; none for one without.

    Args:
        architecture: The model's.
        overrides: The recipe's ``model:`` keys.
        grouped: Whether the layers are Transformer Engine's, which multiply all experts at once.

    Raises:
        UserError: A key that only means something with experts, or one that is not supported.
    """
    if not architecture.transformer.get("num_moe_experts"):
        for name, value in overrides.items():
            if not name.startswith("moe_") and name != "num_moe_experts":
                continue
            raise UserError(
                f"model.{name}={value} conflicts with config.json of model.hf, which has no "
                f"experts. Remove model.{name}."
            )
        return {}
    for name, reason in REFUSED.items():
        if overrides.get(name):
            raise UserError(
                f"model.{name}={overrides[name]} is not supported: {reason}. Remove model.{name}."
            )
    if overrides.get(BALANCING, "none") != "none":
        raise UserError(
            f"model.{BALANCING}={overrides[BALANCING]} is not supported: which expert a token goes "
            f"to, and the loss, must not depend on other tokens. Remove model.{BALANCING}."
        )
    if overrides.get(DISPATCHER, "alltoall") != "alltoall":
        raise UserError(
            f"model.{DISPATCHER}={overrides[DISPATCHER]} is not supported: packs differ in length, "
            f"which only alltoall allows. Remove model.{DISPATCHER}."
        )
    return {
        BALANCING: "none",
        # Rounded to bf16, logits of many experts are often equal, and the order decides.
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": grouped,
    }
