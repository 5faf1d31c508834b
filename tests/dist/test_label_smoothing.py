"""Smoothed targets equal torch's own cross entropy, however the vocabulary is split."""

import numpy as np
import pytest
import torch

from tests.convert.tiny import make_tiny_llama
from tests.dist import jobs, logprob_jobs
from tests.dist.layouts import LAYOUTS, SEED

VOCAB = 131  # not a multiple of anything: the second rank's slice ends in padding
NAMES = ("one", "tp2", "tp2_sp", "pp2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("smoothing") / "hf", seed=SEED, vocab=VOCAB)


def expected_step(hf, smoothing: float) -> tuple[float, float, float]:
    """As ``logprob_jobs.train_sft``, by transformers and ``torch.nn.functional.cross_entropy``."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert network.config.vocab_size == VOCAB
    network.get_input_embeddings().padding_idx = None  # which would have no gradient
    logits, targets = [], []
    for prompt, response in jobs.random_sequences(SEED, 12, VOCAB):
        ids = torch.tensor(np.concatenate([prompt, response])).long()
        logits.append(network(ids[None]).logits[0, len(prompt) - 1 : -1])
        targets.append(ids[len(prompt) :])
    rows, labels = torch.cat(logits), torch.cat(targets)
    loss = torch.nn.functional.cross_entropy(rows, labels, label_smoothing=smoothing)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
    plain = -torch.nn.functional.cross_entropy(rows, labels)
    return loss.item(), norm.item(), plain.item()


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_torchs(pool, model, name):
    """With blocks of 5 rows, all of which but the last are computed a second time."""
    world_size, layout = LAYOUTS[name]
    options = {"hf": str(model), "layout": layout, "seed": SEED, "vocab": VOCAB}
    expected = expected_step(model, 0.3)
    ranks = pool.run(
        world_size, logprob_jobs.train_sft, smoothing=0.3, rows_at_once=5, **options)
    for rank in ranks:
        np.testing.assert_allclose(rank, expected, rtol=1e-5, err_msg=f"seed {SEED}")
    # What nobody smoothes is as it was, and a share of 0 is the same loss to the last bit.
    plain = pool.run(world_size, logprob_jobs.train_sft, **options)
    none = pool.run(world_size, logprob_jobs.train_sft, smoothing=0.0, **options)
    assert [rank[0] for rank in none] == [rank[0] for rank in plain]
    np.testing.assert_allclose(none, plain, rtol=1e-5)
    # The loss may be equal by chance; of a gradient from near uniform predictions 0.3 are gone.
    assert expected[1] < 0.9 * plain[0][1], "smoothing would not show"
