"""A row: one Megatron parameter and the HF tensors that it is made of, used both ways.

``{}`` is the global layer number, a second one the expert's. Dimensions are names of
``Architecture.dims``, so that a folder can be checked from its headers alone. A row with ``when``
applies only where the architecture has that property: a TransformerConfig field that is on,
``untied`` embeddings, or a property of the ``Architecture`` itself (``reward``, ``mlp_bias`` and
the like).
"""

from dataclasses import dataclass

from megatron_irl.families.architecture import Architecture
from megatron_irl.families.tensors import Replicated, Transform, Vocabulary


def is_of_expert(name: str) -> bool:
    """Whether a Megatron parameter is an expert's, by its canonical name."""
    return ".mlp.experts." in name


@dataclass(frozen=True)
class HfTensor:
    """An HF tensor by name, with the names of its dimensions."""

    name: str
    dims: tuple[str, ...]

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        return tuple(arch.dims[d] for d in self.dims)


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: str
    transform: Transform
    hf: tuple[HfTensor, ...]
    when: str | None = None

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Of the whole Megatron parameter, all tensor-parallel shards together."""
        shapes = [t.shape(arch) for t in self.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def at(self, layer: int, expert: int | None = None) -> "Row":
        """The row of one layer, and of one expert where it is a row of experts."""
        hf = tuple(HfTensor(t.name.format(layer, expert), t.dims) for t in self.hf)
        return Row(self.megatron.format(layer, expert), self.transform, hf, self.when)

    @property
    def of_experts(self) -> bool:
        """Whether there is one for every expert of a layer."""
        return is_of_expert(self.megatron)

    def applies(self, arch: Architecture) -> bool:
        """Whether the architecture has this parameter."""
        if self.when is None:
            return True
        if self.when == "untied":
            return not arch.tie_word_embeddings and not arch.reward
        if self.when in arch.transformer:
            return bool(arch.transformer[self.when])
        return bool(getattr(arch, self.when))


def hf(name: str, *dims: str) -> HfTensor:
    """Shorthand for the families' files."""
    return HfTensor(name, dims)


EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
REWARD_HEAD = "reward_head"  # the attribute that model.reward_head gives the last chunk
ADAPTER = "adapter"  # the attribute that ``adapters`` gives a linear layer
LAYER = "decoder.layers.{}."  # what Megatron's names of a layer's parameters begin with
EXPERT = LAYER + "mlp.experts.local_experts.{}."  # and of one of its experts'

# transformers' sequence classifiers of every family call it that.
REWARD_ROW = Row(
    f"{REWARD_HEAD}.weight", Replicated(), (hf("score.weight", "one", "hidden"),), when="reward"
)


def embedding_row(name: str) -> Row:
    """The word embeddings, by their HF name."""
    return Row(EMBEDDING, Vocabulary(), (hf(name, "vocab", "hidden"),))


def head_row(name: str) -> Row:
    """The output head of a model whose head is not its embedding, by its HF name."""
    return Row(HEAD, Vocabulary(), (hf(name, "vocab", "hidden"),), when="untied")
