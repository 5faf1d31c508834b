import os


def test_workers_are_cpu_ranks_on_any_machine(pool):
    """Their backend is gloo, and there may be fewer GPUs than ranks."""
    assert pool.run(1, os.getenv, key="MEGATRON_IRL_PLATFORM") == ["cpu"]
