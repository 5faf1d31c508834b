"""The short version of ``python -m tests.faults``: two random kills of one run."""

import pytest

from tests.faults.cases import write_inputs
from tests.faults.story import make_reference, tell_story


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random(tmp_path, zygote):
    """rft over two replicas; the final metrics, samples and weights are bitwise the same.

    Of fresh processes in the reference; those that are killed are forks.
    """
    write_inputs(tmp_path)
    reference = make_reference("rft_dp2", tmp_path)
    assert len(reference.trajectory["steps"]) == 10 and reference.trajectory["weights"]
    story = tell_story("rft_dp2", tmp_path, reference, kind="kill", seed=7, num_faults=2,
                       zygote=zygote)
    assert story.wrong == [] and len(story.faults) == 2, story
