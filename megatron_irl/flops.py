"""Operations of a training step, counted from what its packs hold."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_irl.families.architecture import Architecture


@dataclass(frozen=True)
class Tokens:
    """What a step's sequences add up to.

    Attributes:
        sum: Tokens that the layers compute, prompts included.
        squares: Sum over sequences of their squared lengths.
        rows: Response tokens, each of which the head sees one row of.
        sequences: How many they are.
        longest: The longest of them.
        again: Tokens of shared prompts that attention goes over beside those of ``sum``.
    """

    sum: int
    squares: int
    rows: int
    sequences: int
    longest: int
    again: int = 0

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]], *, sharing: int = 1) -> "Tokens":
        """Of (prompt tokens, response tokens) of each sequence.

        Args:
            sharing: How many neighbours have a prompt in common.
        """
        pairs = np.array(list(lengths), dtype=np.int64).reshape(-1, 2)
        whole = pairs.sum(1)
        again = int(pairs[:, 0].sum() - pairs[::sharing, 0].sum())
        return cls(int(whole.sum()) - again, int((whole**2).sum()), int(pairs[:, 1].sum()),
                   len(pairs), int(whole.max(initial=0)), again)

    def __mul__(self, times: float) -> "Tokens":
        """So many times the same sequences."""
        return Tokens(round(self.sum * times), round(self.squares * times),
                      round(self.rows * times), round(self.sequences * times), self.longest,
                      round(self.again * times))

    @property
    def whole(self) -> int:
        """Tokens of the sequences, a shared prompt counted in each: what other trainers compute."""
        return self.sum + self.again

    @property
    def padded(self) -> "Tokens":
        """The same work as an ordinary trainer does it: all padded to the longest, whole head."""
        total = self.sequences * self.longest
        return Tokens(total, self.sequences * self.longest**2, total, self.sequences, self.longest)


def layer_parameters(arch: Architecture, experts: float | None = None) -> float:
    """Weights of the matrices of one layer, each used once for every token.

    Args:
        experts: How many of a mixture's are counted; None: as many as a token goes to.
    """
    dims, transformer = arch.dims, arch.transformer
    attention = dims["hidden"] * (dims["qkv"] + dims["q"])
    if not dims["experts"]:
        return attention + expert_parameters(arch)
    counted = transformer["moe_router_topk"] if experts is None else experts
    return attention + dims["hidden"] * dims["experts"] + counted * expert_parameters(arch)


def expert_parameters(arch: Architecture) -> int:
    """Weights of one MLP: of an expert in a mixture, else of the layer's own."""
    gates = 2 if arch.transformer.get("gated_linear_unit") else 1
    return arch.dims["hidden"] * (gates + 1) * arch.dims["ffn"]


def experts_hit(arch: Architecture, tokens: float) -> float:
    """Experts of a layer that at least one of so many tokens goes to, on average; 0 without any.

    A token's experts are as many different ones as ``moe_router_topk``, all equally likely: another
    token misses one of E with a probability of 1 - topk/E. Routers that prefer some hit fewer.
    """
    experts = arch.dims["experts"]
    if not experts:
        return 0.0
    missed = 1 - arch.transformer["moe_router_topk"] / experts
    return experts * (1 - missed**tokens)


def unused_parameters(arch: Architecture, experts: float) -> float:
    """Weights of all layers' experts beyond so many a layer; 0 without any."""
    beyond = arch.dims["experts"] - experts if arch.dims["experts"] else 0.0
    return arch.transformer["num_layers"] * beyond * expert_parameters(arch)


def attended(arch: Architecture, tokens: Tokens) -> float:
    """Σs²/2 of a causal layer; for layers with a window less, as far as Σs² lets see."""
    window = arch.transformer.get("window_size")
    half = tokens.squares / 2
    if not window or not tokens.sum:
        return half
    mean = tokens.squares / tokens.whole  # the length of a sequence, weighted by tokens
    return half if mean <= window[0] else tokens.whole * window[0] - 0.5 * tokens.sequences * (
        window[0] ** 2)


def forward_flops(arch: Architecture, tokens: Tokens, *, head: bool = True) -> float:
    """Two operations a weight and token, the head's on response rows, causal attention."""
    layers = arch.transformer["num_layers"]
    return (
        2.0 * layers * layer_parameters(arch) * tokens.sum
        + 4.0 * layers * arch.dims["q"] * attended(arch, tokens)
        + (2.0 * arch.dims["hidden"] * arch.vocab_size * tokens.rows if head else 0.0)
    )


def training_flops(
    arch: Architecture, tokens: Tokens, *, head: bool = True, adapter_parameters: int | None = None
) -> float:
    """Model FLOPs of forward and backward; what is computed again (recompute) is not counted.

    Args:
        head: Whether the language-model head is computed.
        adapter_parameters: Of LoRA, whose frozen weights need no gradient of their own; None:
            everything is trained.
    """
    if adapter_parameters is None:
        return 3.0 * forward_flops(arch, tokens, head=head)
    layers = arch.transformer["num_layers"]
    weights = 2.0 * layers * layer_parameters(arch) * tokens.sum
    logits = 2.0 * arch.dims["hidden"] * arch.vocab_size * tokens.rows if head else 0.0
    attention = 4.0 * layers * arch.dims["q"] * attended(arch, tokens)
    return 2 * (weights + logits) + 3 * attention + 6.0 * adapter_parameters * tokens.sum

