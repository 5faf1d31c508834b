import os

from tests.dist.pool import Pool


def test_workers_are_cpu_ranks_on_any_machine(pool):
    """Their backend is gloo, and there may be fewer GPUs than ranks."""
    assert pool.run(1, os.getenv, key="MEGATRON_IRL_PLATFORM") == ["cpu"]


def test_workers_with_too_many_threads_are_replaced(monkeypatch, zygote):
    made = Pool(zygote)
    try:
        ((first,), (same,)) = (made.run(1, os.getpid) for _ in range(2))
        monkeypatch.setattr("tests.dist.pool.MAX_THREADS", 0)
        (other,) = made.run(1, os.getpid)
    finally:
        made.close()
    assert first == same != other
