"""Groups over one gloo device: few threads, and the same sums between ranks of several groups."""

import os

import torch
import torch.distributed as dist

from megatron_irl.config import ParallelConfig
from megatron_irl.parallel.topology import initialize, shutdown


def threads() -> list[str]:
    return [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]


def test_groups_share_their_device():
    """Each would have a thread of its own, ``gloo_tcp_loop``, and there are some twenty groups."""
    before = len([name for name in threads() if name.startswith("gloo_tcp_loop")])
    initialize(ParallelConfig())
    try:
        made = len([name for name in threads() if name.startswith("gloo_tcp_loop")])
        assert len(dist.distributed_c10d._world.pg_map) > 10
    finally:
        shutdown()
    assert made <= before + 1 and made <= 2


TURNS, SIZE = 4, 1000


def numbers_of(rank: int) -> list[torch.Tensor]:
    """What a rank gives to the five groups it is in, turn by turn; whole, so that sums are."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(1000, (SIZE,), generator=generator) for _ in range(5 * TURNS)]


def sums_of_many_groups() -> list[list[int]]:
    """Sums, all in flight at once, over groups of all four ranks, of a pair, and of one."""
    rank = initialize(ParallelConfig()).rank
    members = [*[[0, 1, 2, 3]] * 3, [0, 1], [2, 3], *([r] for r in range(4))]
    groups = [dist.new_group(each) for each in members]
    own = [group for group, each in zip(groups, members, strict=True) if rank in each]
    tensors = numbers_of(rank)
    works = [dist.all_reduce(tensor, group=group, async_op=True)
             for tensor, group in zip(tensors, own * TURNS, strict=True)]
    for work in works:
        assert work is not None
        work.wait()
    return [tensor.tolist() for tensor in tensors]


def test_ranks_of_several_groups_get_their_own_sums(pool):
    found, given = pool.run(4, sums_of_many_groups), [numbers_of(rank) for rank in range(4)]
    for rank, sums in enumerate(found):
        pair, alone = [rank, rank ^ 1], [rank]
        for number, total in enumerate(sums):
            members = [range(4), range(4), range(4), pair, alone][number % 5]
            assert total == sum(given[each][number] for each in members).tolist()
