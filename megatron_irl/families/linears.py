"""Which linear layers a model has, by the names that HF and peft call them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.rows import EMBEDDING, HEAD, HfTensor, Row
from megatron_irl.families.table import rows
from megatron_irl.families.tensors import Replicated, Split

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the output head


@dataclass(frozen=True)
class TargetedLayer:
    """A Megatron linear layer some of whose HF modules have adapters.

    Attributes:
        row: Of its weight.
        parts: Which of ``row.hf`` have one, ascending. Megatron fuses q, k and v, and gate and up.
    """

    row: Row
    parts: tuple[int, ...]

    @property
    def modules(self) -> list[str]:
        """HF's names of the modules with an adapter, in the order of ``parts``."""
        return [module_name(self.row.hf[part]) for part in self.parts]

    @property
    def splits_input(self) -> bool:
        """Whether tensor parallelism cuts its input (row-parallel) and not its output."""
        return self.row.transform == Split(1)


def module_name(tensor: HfTensor) -> str:
    """The HF module that a weight belongs to."""
    return tensor.name.removesuffix(".weight")


def linear_rows(arch: Architecture) -> Iterator[Row]:
    """Rows of linear layers that may have adapters, the head's if it is one of its own.

    The router and the experts of a mixture may not. transformers 5 keeps a layer's experts as one
    tensor, for which peft knows adapters of another shape (``target_parameters``) than for the
    matrices that a folder holds.
    """
    for row in rows(arch):
        is_matrix = len(row.hf[0].dims) == 2 and row.megatron.endswith(".weight")
        if row.megatron == EMBEDDING or row.of_experts or isinstance(row.transform, Replicated):
            continue
        if is_matrix:
            yield row


def target_names(arch: Architecture) -> list[str]:
    """What ``adapter.targets`` may say of a model, besides ``all-linear``."""
    names = [module_name(t).rpartition(".")[2] for row in linear_rows(arch) for t in row.hf]
    return list(dict.fromkeys(names))


def targeted_layers(
    arch: Architecture, targets: Sequence[str], adapter: Path | None = None
) -> list[TargetedLayer]:
    """The layers that targets name, in the order of the forward pass.

    Args:
        targets: Ends of HF module names, whole components: ``q_proj``, ``self_attn.q_proj``; or
            ``all-linear``, which is all that ``linear_rows`` gives but the head.
        adapter: The folder that says so, for errors; None: the recipe does.

    Raises:
        UserError: A target that names no such layer, with the list of what there is.
    """
    layers, used = [], set()
    for row in linear_rows(arch):
        parts = []
        for part, tensor in enumerate(row.hf):
            name = module_name(tensor)
            hits = {t for t in targets if name == t or name.endswith("." + t)}
            if ALL_LINEAR in targets and row.megatron != HEAD:
                hits.add(ALL_LINEAR)
            if hits:
                parts.append(part)
            used |= hits
        if parts:
            layers.append(TargetedLayer(row, tuple(parts)))
    unknown = [target for target in targets if target not in used]
    if unknown:
        key = "adapter.targets" if adapter is None else f"{adapter}: target_modules"
        raise UserError(
            f"{key}={unknown[0]} is no linear layer of this model that can have an adapter; there "
            f"are {', '.join([*target_names(arch), ALL_LINEAR])}.{_without_adapter(arch)} "
            + ("Set adapter.targets to some of these." if adapter is None
               else "Give an adapter of some of these.")
        )
    return layers


def _without_adapter(arch: Architecture) -> str:
    """Which layers of a model have none, as sentences."""
    text = ""
    if arch.tie_word_embeddings:
        text += (" Its output head is the embedding (tie_word_embeddings=true in config.json) and "
                 "takes no adapter of its own.")
    if arch.dims["experts"]:
        text += " Its router and its experts take none."
    return text
