"""One gloo device for all process groups of a process.

torch gives every group a device of its own, with a thread that looks for messages a hundred times a
second, and Megatron makes twenty groups and more, most of them of one rank. On a busy machine those
threads are a fifth of what several ranks compute. What a group sends is the same over any device.

To be removed when torch's groups share a device, or its threads sleep until there is a message.
"""

import functools
import os
from typing import Any

from torch.distributed import distributed_c10d


def share_device() -> None:
    """Have all groups that are made from now on share one; for the process, once."""
    create = getattr(distributed_c10d, "_create_gloo_process_group", None)
    if create is None:
        return  # another torch, which makes them in another way
    backend: Any = distributed_c10d.Backend
    backend._ensure_backend_registered("gloo")
    known = backend._plugins["GLOO"]
    if known.creator_fn is create:
        backend._plugins["GLOO"] = known._replace(
            creator_fn=functools.partial(_create_group, create))


def _create_group(create: Any, given: Any, backend_options: Any) -> Any:
    if getattr(given, "enable_reconfigure", False):
        return create(given, backend_options)
    group: Any = distributed_c10d.ProcessGroupGloo
    options = group._Options()
    options._devices = _devices(os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME"))
    options._threads = 2 * len(options._devices)  # as torch
    options._timeout = given.timeout
    options.global_ranks_in_group = given.global_ranks_in_group
    options.group_name = given.group_id
    return group(given.store, given.group_rank, given.group_size, options)


@functools.cache
def _devices(pid: int, interfaces: str | None) -> list[Any]:
    """This process's, over the network interfaces that the user has named."""
    del pid  # a fork has none of its parent's threads
    group: Any = distributed_c10d.ProcessGroupGloo
    if not interfaces:
        return [group.create_default_device()]
    return [group.create_device(interface=name) for name in interfaces.split(",")]
