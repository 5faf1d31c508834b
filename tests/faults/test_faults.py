"""The short version of ``python -m tests.faults``: two random kills, and a stop."""

import pytest

from tests.faults.cases import write_inputs
from tests.faults.story import make_reference, tell_story


@pytest.mark.slow
def test_killed_and_stopped_at_random(tmp_path):
    """rft over two replicas; the final metrics, samples and weights are bitwise the same."""
    write_inputs(tmp_path)
    case = "rft_dp2"
    reference = make_reference(case, tmp_path)
    assert len(reference.trajectory["steps"]) == 10 and reference.trajectory["weights"]
    for kind, faults, seed in (("kill", 2, 7), ("term", 1, 3)):
        story = tell_story(case, tmp_path, reference, kind=kind, seed=seed, num_faults=faults)
        assert story.wrong == [], story
        assert len(story.faults) == faults
