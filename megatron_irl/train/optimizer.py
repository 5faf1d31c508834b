"""Megatron's optimizer and learning-rate schedule from the recipe."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from megatron_irl import hardware
from megatron_irl.compat import cpu_updates, narrow_optimizer
from megatron_irl.config import Recipe, check_open_section
from megatron_irl.errors import UserError
from megatron_irl.model.reward_head import PARAMETER
from megatron_irl.parallel.topology import Topology
from megatron_irl.train.host_optimizer import completed

from megatron.core.optimizer import (  # isort: skip
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

Frozen = Literal["trunk", "reward_head"] | None

DEFAULTS: dict[str, Any] = {"lr": 5e-7, "weight_decay": 0.0, "clip_grad": 1.0}


def build_optimizer_config(
    recipe: Recipe, config: TransformerConfig, *, check_hardware: bool = True
) -> OptimizerConfig:
    """Megatron's OptimizerConfig: our defaults, then the recipe's ``optimizer:`` keys.

    Args:
        check_hardware: Without it the optimizer may be one that this machine cannot run.

    Raises:
        UserError: An unknown key, or values that Megatron refuses.
    """
    check_open_section("optimizer", recipe.optimizer, OptimizerConfig)
    fields = DEFAULTS | {
        "bf16": config.bf16,
        "params_dtype": config.params_dtype,
        "use_distributed_optimizer": shards_optimizer(recipe),
    } | completed(recipe, check_hardware=check_hardware)
    known = ("adam", "sgd", "lion")
    name = fields.get("optimizer", "adam")
    if name not in known and importlib.util.find_spec("emerging_optimizers") is None:
        raise UserError(
            f"optimizer.optimizer={name} is not one of {', '.join(known)}, and the package "
            "emerging-optimizers, which has others, is not installed. Set one of these."
        )
    if not isinstance(fields["lr"], int | float) or fields["lr"] < 0:
        raise UserError(f"optimizer.lr={fields['lr']!r} is not a number >= 0. Set a learning rate.")
    fields.setdefault("min_lr", fields["lr"] * recipe.schedule.min_lr_ratio)
    try:
        return narrow_optimizer.config_of(fields, runs_here=check_hardware)
    except (ValueError, AssertionError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"Megatron-Core refuses this optimizer configuration: {error}") from error


def shards_optimizer(recipe: Recipe) -> bool:
    """Whether the optimizer state is split over data parallelism (Megatron: Adam and Lion only).

    Raises:
        UserError: ``ddp`` and ``optimizer`` say different things, or it cannot be split.
    """
    name = recipe.optimizer.get("optimizer", "adam")
    asked = {
        section: getattr(recipe, section)["use_distributed_optimizer"]
        for section in ("optimizer", "ddp")
        if "use_distributed_optimizer" in getattr(recipe, section)
    }
    if len(set(asked.values())) > 1:
        raise UserError(
            f"optimizer.use_distributed_optimizer={asked['optimizer']} conflicts with "
            f"ddp.use_distributed_optimizer={asked['ddp']}. Set one of them only."
        )
    possible = name in ("adam", "lion")
    wanted = next(iter(asked.values()), possible)
    if wanted and not possible:
        raise UserError(
            f"optimizer.optimizer={name} conflicts with use_distributed_optimizer=true; Megatron "
            "shards the state of adam and lion only. Set use_distributed_optimizer to false."
        )
    return wanted


def build_optimizer(
    options: OptimizerConfig, chunks: Sequence[Any], topology: Topology, *,
    head_lr: float | None = None, min_lr_ratio: float = 0.0,
) -> Any:
    """Megatron's optimizer over a policy's chunks, the reward head in a group of its own.

    Args:
        options: As ``build_optimizer_config`` makes it.
        chunks: DDP-wrapped.
        head_lr: Peak learning rate of the reward head; None: the model has none.
        min_lr_ratio: Its final learning rate as a share of the peak.

    Collectives: every rank must call.
    """
    overrides = None
    if head_lr is not None:
        # With overrides of ours Megatron leaves its own out (no decay of biases and norms).
        overrides = get_standard_config_overrides(options) | reward_head_group(
            head_lr, min_lr=head_lr * min_lr_ratio
        )
    return build_megatron_optimizer(options, chunks, topology, overrides=overrides)


def build_megatron_optimizer(
    options: OptimizerConfig, chunks: Sequence[Any], topology: Topology, *,
    overrides: dict[ParamKey, Any] | None = None,
) -> Any:
    """Megatron's optimizer over DDP-wrapped chunks. Collective over every rank.

    Args:
        overrides: Settings of parameter groups of their own, as Megatron takes them.
    """
    with narrow_optimizer.buildable(options):
        optimizer = get_megatron_optimizer(
            options, list(chunks), config_overrides=overrides, use_gloo_process_groups=False,
            pg_collection=topology.groups,
        )
    if hardware.BACKEND == "gloo":
        cpu_updates.install()
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            cpu_updates.fuse(part.optimizer)
    return optimizer


def reward_head_group(lr: float, *, min_lr: float = 0.0) -> dict[ParamKey, Any]:
    """Megatron's override that gives the reward head a parameter group of its own.

    No weight decay. Its ``start_wd`` also marks the group: no other has one, so that Megatron
    tells the groups of a checkpoint apart even where the learning rates are equal.
    """
    own = {"max_lr": lr, "min_lr": min_lr, "start_wd": 0.0, "end_wd": 0.0}
    return {ParamKey(name=f"*{PARAMETER}"): own}


@contextmanager
def freeze(optimizer: Any, frozen: Frozen) -> Iterator[None]:
    """Hold some parameters still for one update.

    Without a gradient Adam would still move them by their momentum, and weight decay too; with a
    learning rate of 0 neither does.
    """
    groups = [
        group for group in optimizer.param_groups
        if frozen is not None and (frozen == "reward_head") == _is_reward_head(group)
    ]
    rates = [group["lr"] for group in groups]
    # Megatron's property gives the inner optimizers' own dictionaries, so this reaches the update.
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


@contextmanager
def lowered(optimizer: Any, scale: float) -> Iterator[None]:
    """Multiply every learning rate for one update; the schedule goes on as it would."""
    groups = list(optimizer.param_groups) if scale != 1.0 else []
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= scale
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _is_reward_head(group: dict[str, Any]) -> bool:
    return group.get("start_wd") is not None


def build_schedule(recipe: Recipe, optimizer: Any) -> OptimizerParamScheduler:
    """Warmup then decay over the run, or over one round with ``reset_optimizer: round``.

    The schedule stands one step ahead, so that the first update of a warmup already moves.
    """
    algorithm, schedule = recipe.algorithm, recipe.schedule
    assert algorithm.steps_per_round is not None, "the recipe must be resolved"
    per_round = algorithm.reset_optimizer == "round"
    steps = algorithm.steps_per_round * (1 if per_round else algorithm.rounds)
    peak = float(optimizer.config.lr)
    decay = float(optimizer.config.weight_decay)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=float(optimizer.config.min_lr),
        lr_warmup_steps=min(int(steps * schedule.lr_warmup_fraction), steps),
        lr_decay_steps=steps + 1,  # one more than updates, as it stands one step ahead
        lr_decay_style=schedule.lr_decay_style,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(1)
    return scheduler


def reset_optimizer(optimizer: Any) -> None:
    """Forget the moments, as at the start of a new stage; parameters stay."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        # One that is partly on the host has several inside, whose state it shows as its own.
        for inner in (part.optimizer, *getattr(part.optimizer, "sub_optimizers", ())):
            # In place, and nothing is deleted: Megatron looks for the state when it saves, and
            # torch's Adam would begin anew with other tensors.
            for state in inner.state.values():
                for name, value in state.items():
                    if name == "step" and not hasattr(value, "zero_"):
                        state[name] = 0
                    elif hasattr(value, "zero_") and name != "master_param":
                        value.zero_()
            for group in inner.param_groups:
                if "step" in group:  # fused optimizers keep the count per group
                    group["step"] = group["step"] * 0


def current_lr(optimizer: Any) -> float:
    """The learning rate of the next update; of the policy, not of the reward head."""
    groups = optimizer.param_groups
    return float(max(group["lr"] for group in groups if not _is_reward_head(group)))
