"""Fixtures that every folder of tests may use."""

import pytest

from megatron_irl.collector import keep_aside
from tests.dist.pool import Pool
from tests.faults.forked import Zygote


def pytest_collection_finish():
    """What the libraries are made of is over a million objects, and stays.

    Each full collection would go through them: a quarter of the suite's processor time.
    """
    keep_aside()


@pytest.fixture(scope="session")
def zygote():
    """A process that has made the imports, whose forks are ranks and runs; see its docstring."""
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def pool(zygote):
    """Four gloo ranks for the whole session; started by the first test that asks."""
    workers = Pool(zygote)
    yield workers
    workers.close()
