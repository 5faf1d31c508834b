"""Fixtures that every folder of tests may use."""

import pytest

from tests.dist.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Four gloo ranks for the whole session; started by the first test that asks."""
    workers = Pool()
    yield workers
    workers.close()
