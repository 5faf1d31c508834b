"""What the adapters of a run are, settled before a model is built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_irl.config.schema import AdapterConfig, ParallelConfig
from megatron_irl.convert.peft_folder import PeftFolder
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.linears import TargetedLayer, targeted_layers
from megatron_irl.families.table import HEAD


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters of a model: what they are, where they sit, what they begin with.

    Attributes:
        rank, alpha: The update of a weight is alpha / rank * B A, A [rank, in], B [out, rank].
        dropout: Of the input of A, in training only.
        layers: Where they sit.
        init: Distribution of A; B begins as zero, and so the model as its base.
        seed: Of A.
        start: Folder whose adapter they begin with, instead.
    """

    rank: int
    alpha: float
    dropout: float
    layers: tuple[TargetedLayer, ...]
    init: Literal["kaiming", "normal"] = "kaiming"
    seed: int = 0
    start: PeftFolder | None = None

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @property
    def target_names(self) -> list[str]:
        """Peft's ``target_modules``: the last component of each module's name."""
        names = [name.rpartition(".")[2] for layer in self.layers for name in layer.modules]
        return list(dict.fromkeys(names))


def adapter_spec(
    options: AdapterConfig, arch: Architecture, parallel: ParallelConfig, *, seed: int
) -> AdapterSpec | None:
    """The adapters that a recipe asks for; None without any.

    Raises:
        UserError: Targets that the model does not have; a start adapter that is damaged, of another
            model, or not what the section says.
    """
    if not options.enabled:
        return None
    start = PeftFolder.read(Path(options.path)) if options.path else None
    if start is None:
        assert options.rank is not None
        rank, targets = options.rank, options.targets
        alpha = options.alpha if options.alpha is not None else float(rank)
    else:
        rank, alpha, targets = start.rank, start.alpha, start.targets
        _check_same(options, start)
    layers = tuple(targeted_layers(arch, targets, start.folder if start else None))
    if start is not None:
        start.check(arch, layers)
        _check_targets(options, start, arch, layers)
    only_head = all(layer.row.megatron == HEAD for layer in layers)
    stages = parallel.pipeline_model_parallel_size
    if only_head and stages > 1:
        raise UserError(
            f"adapter.targets={', '.join(targets)} conflicts with "
            f"parallel.pipeline_model_parallel_size={stages}; all stages but the last would have "
            "nothing to train. Set it to 1, or target layers of every stage."
        )
    return AdapterSpec(rank, alpha, options.dropout, layers, options.init, seed, start)


def _check_same(options: AdapterConfig, start: PeftFolder) -> None:
    given = {"rank": (options.rank, start.rank), "alpha": (options.alpha, start.alpha)}
    for name, (asked, found) in given.items():
        if asked is not None and asked != found:
            raise UserError(
                f"adapter.{name}={asked} conflicts with adapter.path={start.folder}, whose "
                f"{name} is {found}; a run goes on with the adapter it is given. Remove "
                f"adapter.{name}."
            )


def _check_targets(
    options: AdapterConfig, start: PeftFolder, arch: Architecture,
    layers: tuple[TargetedLayer, ...],
) -> None:
    """Raise UserError unless the recipe names the layers that a start has, in whatever words."""
    targets = options.targets
    if targets != AdapterConfig().targets and tuple(targeted_layers(arch, targets)) != layers:
        raise UserError(
            f"adapter.targets={', '.join(targets)} conflicts with adapter.path={start.folder}, "
            f"which has {', '.join(start.targets)}. Remove adapter.targets."
        )
