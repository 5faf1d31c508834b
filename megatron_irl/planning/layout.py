"""What a plan is made for: a recipe's layout on a machine, with everything that follows from it."""

from dataclasses import dataclass
from typing import Any

from megatron_irl.config import Recipe
from megatron_irl.families.architecture import Architecture
from megatron_irl.planning.machines import Machine
from megatron_irl.train.optimizer import shards_optimizer


@dataclass(frozen=True)
class Setup:
    """A resolved recipe on ranks of one kind.

    Attributes:
        config: Megatron's TransformerConfig.
        dp: Data-parallel size.
        lean: Layers are Transformer Engine's, which keep less than the local ones.
        replicas: The stages of a pipeline generate as replicas, on all layers each.
    """

    recipe: Recipe
    arch: Architecture
    config: Any
    machine: Machine
    dp: int
    lean: bool
    replicas: bool = False

    @property
    def tp(self) -> int:
        return self.recipe.parallel.tensor_model_parallel_size

    @property
    def ep(self) -> int:
        """Tensor-parallel ranks with experts of their own; 1: with slices of all of them."""
        return self.recipe.parallel.expert_model_parallel_size

    @property
    def chosen(self) -> int:
        """Experts of a layer that a token goes to; 0 without any."""
        return self.arch.transformer.get("moe_router_topk", 0)

    @property
    def pp(self) -> int:
        return self.recipe.parallel.pipeline_model_parallel_size

    @property
    def vpp(self) -> int:
        return self.recipe.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def generators(self) -> int:
        """Replicas while generating."""
        return self.dp * (self.pp if self.replicas else 1)

    @property
    def layers(self) -> int:
        """Of one stage."""
        return self.arch.transformer["num_layers"] // self.pp

    @property
    def captures(self) -> bool:
        """Whether decode steps run as CUDA graphs."""
        return self.recipe.generation.cuda_graphs != "off"

    @property
    def shards_optimizer(self) -> bool:
        return shards_optimizer(self.recipe)

    @property
    def vocabulary(self) -> int:
        """Columns of this rank's logits."""
        return -(-self.arch.vocab_size // self.tp)

    def in_flight(self, stage: int, microbatches: int) -> float:
        """Microbatches whose activations a stage holds at once, in whole stages of layers.

        1F1B: one for every stage from here to the last. Interleaved: the chunks of its warm-up and
        one more, each a share of the layers.
        """
        if self.vpp == 1:
            return min(self.pp - stage, microbatches)
        warmup = (self.pp - stage - 1) * 2 + (self.vpp - 1) * self.pp
        return min(warmup + 1, microbatches * self.vpp) / self.vpp
