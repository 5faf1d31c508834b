"""During optimisation the weights exist once: counted on live tensors inside real runs."""

import numpy as np
import pytest

from tests.cli import harness
from tests.cli.harness import write_recipe
from tests.convert.tiny import make_tiny_llama
from tests.dist.memory import live_tensors, storage_bytes

# In units of the weights: parameters, gradients and Adam's two moments, all fp32.
EXPECTED = 4


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    """Large enough that weights dwarf batches and tables."""
    return make_tiny_llama(tmp_path_factory.mktemp("memory") / "model", hidden=128, layers=2,
                           intermediate=512)


class Probe:
    """Looks at the live tensors right after every update.

    Attributes:
        sizes: Bytes of live tensors that the run made, divided by the bytes of its weights.
        copies: How many tensors hold the values that weights had when a round started.
        starts: Those values, as numpy arrays, which are not counted.
        keep_a_copy: Commit the crime.
    """

    def __init__(self, monkeypatch):
        from megatron_irl.run import loop

        self.others = live_tensors()  # of other tests; held, so that no address is used again
        self.sizes, self.copies, self.starts, self.keep_a_copy = [], [], [], False
        step = loop.optimizer_step

        def watched(run, phase, work):
            matrices = [p for c in run.policy.chunks for p in c.parameters() if p.ndim == 2]
            if run.state.step_in_round == 0:
                self.starts.append([p.detach().numpy().copy() for p in matrices])
            extra = [p.detach().clone() for p in matrices] if self.keep_a_copy else []
            update = run.trainer.optimizer.step

            def update_and_look():
                result = update()
                self.look(run, matrices)
                return result

            run.trainer.optimizer.step = update_and_look
            try:
                step(run, phase, work)
            finally:
                run.trainer.optimizer.step = update
            del extra

        monkeypatch.setattr(loop, "optimizer_step", watched)

    def look(self, run, matrices):
        tensors = live_tensors()
        weights = sum(p.nbytes for c in run.policy.chunks for p in c.parameters())
        self.sizes.append((storage_bytes(tensors) - storage_bytes(self.others)) / weights)
        own = {p.untyped_storage().data_ptr() for p in matrices}
        own |= {t.untyped_storage().data_ptr() for t in self.others}
        self.copies.append(sum(
            tensor.numel() == start.size
            and np.array_equal(tensor.detach().flatten().numpy(), start.flatten())
            for tensor in tensors if tensor.untyped_storage().data_ptr() not in own
            for starts in self.starts for start in starts
        ))


@pytest.fixture
def recipe_for(sections, larger_model, tmp_path):
    def write(reference):
        sections["model"] = {"hf": str(larger_model)}
        sections["algorithm"] |= {"reference": reference}
        sections["evaluation"] = {"interval": "never"}
        return write_recipe(tmp_path / "recipe.yaml", **sections)

    return write


@pytest.mark.parametrize("reference", ["round_start", "initial"])
def test_no_second_copy(recipe_for, monkeypatch, no_report, reference):
    probe = Probe(monkeypatch)
    result = harness.run("train", recipe_for(reference))
    assert result.code == 0, result.err
    first, second = probe.starts
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert probe.copies == [0] * 4
    assert all(EXPECTED - 0.1 < size < EXPECTED + 0.3 for size in probe.sizes), probe.sizes


def test_a_second_copy_would_be_seen(recipe_for, monkeypatch, no_report):
    probe = Probe(monkeypatch)
    probe.keep_a_copy = True
    assert harness.run("train", recipe_for("round_start")).code == 0
    assert min(probe.sizes) > EXPECTED + 0.9
    assert probe.copies[0] > 0 and probe.copies[2] > 0  # the first update of each round
