"""Work that may fail on some ranks while the others wait: its result or its error reaches all."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from megatron_irl.errors import UserError, tell_elsewhere
from megatron_irl.parallel.reduce import from_main
from megatron_irl.parallel.topology import Topology


class AnotherRankFailed(RuntimeError):
    """What another rank raised; its traceback is in that rank's output."""


def on_main[T](work: Callable[[], T], topology: Topology) -> T:
    """Do ``work`` on rank 0 and give every rank its result, or its error.

    Without this, an error under ``if topology.is_main`` leaves the other ranks in their next
    collective until it times out. Collective over every rank of the run.

    Args:
        work: Called on rank 0 only; may use no collective. Its result must be small and
            picklable.

    Raises:
        UserError: What rank 0 raised, with the same text on every rank.
        AnotherRankFailed: Rank 0 raised anything else (rank 0 itself raises the original).

    Example:
        steps = on_main(checkpointer.steps, topology)
    """
    result: Any = None
    failure: BaseException | None = None
    if topology.is_main:
        try:
            result = work()
        except Exception as error:  # whatever it is: the others must hear of it
            failure = error
        # What is no Exception (Ctrl-C, RunStopped) ends this process, and the launcher the others.
    # One broadcast, whatever happened: nobody has to know of a failure to know what comes next.
    said, result = from_main((_spoken(failure), result), topology)
    _raise_if(failure, {0: said} if said else {})
    return result


def everywhere[T](work: Callable[[], T], topology: Topology) -> T:
    """Do ``work`` on every rank; if it fails on any, it fails on all of them.

    For what each rank reads or checks by itself before the next collective. Returns the rank's own
    result. Collective over every rank of the run.

    Raises:
        UserError: The lowest failing rank's, on every rank.
        AnotherRankFailed: Another rank raised anything else (that rank raises the original).
    """
    result: Any = None
    failure: BaseException | None = None
    try:
        result = work()
    except Exception as error:  # as above
        failure = error
    said: list[Any] = [_spoken(failure)]
    if topology.world_size > 1:
        # A rank that failed comes here at once. Collectives inside ``work`` are safe only where
        # all of their ranks fail alike: peers that did not are still waiting in them.
        said = [None] * topology.world_size
        dist.all_gather_object(said, _spoken(failure))
    _raise_if(failure, {rank: text for rank, text in enumerate(said) if text})
    return result


Call = Callable[..., Any]
"""(name, *arguments) → what the deed of that name gave."""


def led_by_main[T](
    work: Callable[[Call], T], deeds: Mapping[str, Callable[..., Any]], topology: Topology
) -> T | None:
    """Do ``work`` on rank 0, which may ask every rank for collective deeds meanwhile.

    For a library that knows one process only: it runs on rank 0, the others wait for what it asks.

    Args:
        work: Called on rank 0 only, with ``call(name, *arguments)``; arguments must be picklable.
        deeds: By name; the same on every rank. Each may use collectives over the world and must
            fail on every rank if it fails on one.

    Returns:
        The result of ``work`` on rank 0, None elsewhere.

    Raises: as ``on_main``; what a deed raised, on every rank. Collective over the world.
    """
    if not topology.is_main:
        while True:
            name, arguments = from_main(None, topology)
            if name is None:
                return on_main(lambda: None, topology)
            deeds[name](*arguments)
    fell = False

    def call(name: str, *arguments: Any) -> Any:
        nonlocal fell
        from_main((name, arguments), topology)
        fell = True  # the others too, unless it comes back
        result = deeds[name](*arguments)
        fell = False
        return result

    result: Any = None
    failure: Exception | None = None
    try:
        result = work(call)
    except Exception as error:  # whatever it is: the others must hear of it
        if fell:  # they raise it by themselves
            raise
        failure = error
    from_main((None, ()), topology)

    def said() -> None:
        if failure is not None:
            raise failure

    on_main(said, topology)
    return result


def _spoken(error: BaseException | None) -> Any:
    """An error as what can be sent: a user's error itself, anything else by name and text."""
    if error is None or isinstance(error, UserError):
        return error
    return f"{type(error).__name__}: {error}"


def _raise_if(own: BaseException | None, said: dict[int, Any]) -> None:
    if own is not None:
        raise own  # the original, with its traceback, where it happened
    if said:
        rank, first = min(said.items())
        if isinstance(first, UserError):
            raise tell_elsewhere(first)
        raise AnotherRankFailed(f"rank {rank} failed: {first}")
