"""A tiny model with and without tied embeddings, and prompts for it."""

import numpy as np
import pytest

from tests.convert.tiny import make_tiny_llama
from tests.dist.layouts import SEED, VOCAB
from tests.dist.sampled import PROMPT_LENGTHS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """By whether the embeddings are tied, the folder of a tiny Llama; not to be changed."""
    root = tmp_path_factory.mktemp("tiny")
    return {
        tied: str(make_tiny_llama(root / f"tied_{tied}", tied=tied, seed=SEED, vocab=VOCAB))
        for tied in (False, True)
    }


@pytest.fixture(scope="session")
def prompts():
    rng = np.random.default_rng(SEED)
    return [rng.integers(2, VOCAB, n).astype(np.int32) for n in PROMPT_LENGTHS]
