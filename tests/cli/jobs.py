"""What the ranks of a command-line test run; importable by name."""

import contextlib
import io
from typing import Any

# Before any redirection: a module of Megatron's takes the real standard error when imported.
import megatron_irl.run.loop  # noqa: F401


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command on this rank, as under a launcher."""
    from megatron_irl.cli import main
    from megatron_irl.run import recorder

    report, recorder.write_report = recorder.write_report, lambda folder: folder  # slow charts
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return main(arguments), errors.getvalue()
    finally:
        recorder.write_report = report


def command_killed(arguments: list[str], steps: int) -> None:
    """A command that is killed on every rank after so many optimizer steps."""
    from megatron_irl.parallel.topology import shutdown
    from megatron_irl.run import loop

    original, left = loop.optimizer_step, [steps]

    def step(*given: Any) -> None:
        original(*given)
        left[0] -= 1
        if not left[0]:
            raise TimeoutError("killed")

    loop.optimizer_step = step
    try:
        with contextlib.suppress(TimeoutError):
            command(arguments)
            raise AssertionError("the command ended by itself")
    finally:
        loop.optimizer_step = original
        shutdown()


def states_saved(arguments: list[str]) -> list[dict[str, Any]]:
    """The run states that this rank hands to its checkpoints, in order."""
    import copy

    from megatron_irl.storage.checkpoint import Checkpointer

    states: list[dict[str, Any]] = []
    original = Checkpointer.save

    def spy(self: Any, step: int, chunks: Any, optimizer: Any, scheduler: Any, state: Any,
            *rest: Any) -> None:
        states.append(copy.deepcopy(state))
        original(self, step, chunks, optimizer, scheduler, state, *rest)

    Checkpointer.save = spy
    try:
        code, errors = command(arguments)
    finally:
        Checkpointer.save = original
    assert code == 0, errors
    return states


def batches_encoded(arguments: list[str]) -> tuple[int, int, str]:
    """Exit code of a command, batches of records this rank tokenised in it, standard error."""
    from megatron_irl.data import demonstrations

    original, calls = demonstrations.encode_turns, []

    def spy(*given: Any) -> Any:
        calls.append(given)
        return original(*given)

    demonstrations.encode_turns = spy
    try:
        code, errors = command(arguments)
    finally:
        demonstrations.encode_turns = original
    return code, len(calls), errors


def tensors_of(value):
    """All tensors inside nested dictionaries and lists."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors_of(part)] if isinstance(value, list) else []


def command_with_a_bad_loss(arguments, bad_rank, bad_step):
    """A command in which one rank's loss of one step is NaN."""
    import dataclasses
    import os

    from megatron_irl.run import loop

    original = loop.optimizer_step

    def step(running, phase, work):
        def objective(logprobs_R, batch):
            out = work.objective(logprobs_R, batch)
            return type(out)(out.total * float("nan"), out.weight, out.metrics)

        bad = running.state.step + 1 == bad_step and int(os.environ["RANK"]) == bad_rank
        original(running, phase, dataclasses.replace(work, objective=objective) if bad else work)

    loop.optimizer_step = step
    try:
        return command(arguments)
    finally:
        loop.optimizer_step = original


def pairs_held(arguments: list[str]) -> tuple[int, list[tuple[int, int]]]:
    """The most pairs in this rank's memory at an update, and the parts read, as (round, part)."""
    import gc

    from megatron_irl.data.pair_bank import PairBank
    from megatron_irl.train.step import Stepper
    from megatron_irl.types import Pair

    held: list[int] = []
    parts: list[tuple[int, int]] = []
    step, read = Stepper.train_step, PairBank._read_pairs

    def at_a_step(self: Any, *args: Any, **options: Any) -> Any:
        gc.collect()
        held.append(sum(isinstance(each, Pair) for each in gc.get_objects()))
        return step(self, *args, **options)

    def at_a_read(self: Any, round: int, part: int, known: Any) -> Any:
        parts.append((round, part))
        return read(self, round, part, known)

    Stepper.train_step, PairBank._read_pairs = at_a_step, at_a_read
    try:
        code, errors = command(arguments)
    finally:
        Stepper.train_step, PairBank._read_pairs = step, read
    assert code == 0, errors
    return max(held), parts


def command_with_a_failure(
    arguments: list[str], target: str, rank: int, calls: int, only: str = ""
) -> tuple[int, str]:
    """A command in which one rank fails as the disk might, at the given call of a method.

    Args:
        target: ``module.Class.method``.
        only: Count the calls on objects whose ``root`` has this name.
    """
    import importlib
    import os

    from megatron_irl.errors import UserError

    module, kind, method = target.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind)
    original, count = getattr(owner, method), 0

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        if int(os.environ["RANK"]) == rank and (not only or self.root.name == only):
            count += 1
            if count == calls:
                raise UserError("the disk of one rank")
        return original(self, *args, **options)

    setattr(owner, method, failing)
    try:
        return command(arguments)
    finally:
        setattr(owner, method, original)


def share_of_digits(texts: list[str]) -> list[float]:
    """A scorer as a user might bring one."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def wrong_scores(texts: list[str]) -> list[float]:
    return [0.5] * (len(texts) + 1)


def command_killed_sampling(arguments: list[str], round: int, parts: int) -> None:
    """A command that leaves what one leaves that is killed while it samples for a round.

    Args:
        parts: Of the round each rank has committed so many by then, at most.
    """
    from megatron_irl.parallel.topology import shutdown
    from megatron_irl.storage.shared_bank import SharedBank

    write, finish = SharedBank.write_part, SharedBank.finish_round
    wrote: list[int] = []

    def write_part(self: Any, number: int, *given: Any) -> Any:
        if (self.root.name, number) == ("pairs", round):
            wrote.append(number)
        return write(self, number, *given) if len(wrote) <= parts else None

    def finish_round(self: Any, number: int, *given: Any) -> Any:
        if (self.root.name, number) == ("pairs", round):
            raise TimeoutError("killed")
        return finish(self, number, *given)

    SharedBank.write_part, SharedBank.finish_round = write_part, finish_round  # type: ignore
    try:
        with contextlib.suppress(TimeoutError):
            command(arguments)
            raise AssertionError("the command ended by itself")
    finally:
        SharedBank.write_part, SharedBank.finish_round = write, finish
        shutdown()
