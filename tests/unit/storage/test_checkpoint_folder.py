"""Which checkpoints stay; one that was killed between its two renames is not lost."""

from types import SimpleNamespace

import pytest

from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.storage.checkpoint_folder import CheckpointFolder


def checkpointer(folder, *, is_main=True):
    return Checkpointer(folder, SimpleNamespace(is_main=is_main, world_size=1), keep=1)


def test_folder_moved_aside_is_put_back_by_the_main_rank(tmp_path):
    (tmp_path / ".step_000004.old").mkdir()
    (tmp_path / ".step_000004.old" / "weights").write_text("4")
    checkpointer(tmp_path, is_main=False).clean()
    reader = checkpointer(tmp_path)  # a reader may see a replacement in progress
    assert reader.steps() == []
    reader.clean()
    assert reader.steps() == [4]
    assert (tmp_path / "step_000004" / "weights").read_text() == "4"


def test_what_killed_saves_left_goes(tmp_path):
    for name in (".step_000004.partial", ".step_000009.partial", "step_000002"):
        (tmp_path / name).mkdir()
    checkpointer(tmp_path, is_main=False).clean()
    assert len(list(tmp_path.iterdir())) == 3
    checkpointer(tmp_path).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


@pytest.mark.parametrize(("keep", "every", "left"), [
    (1, None, [7]), (2, None, [6, 7]), (2, 3, [3, 6, 7]), (1, 2, [2, 4, 6, 7]),
    (9, 4, [*range(1, 8)]),
])
def test_the_newest_stay_and_some_of_the_others(tmp_path, keep, every, left):
    for step in range(1, 10):
        (tmp_path / f"step_{step:06d}").mkdir()
    folder = CheckpointFolder(tmp_path, keep=keep, keep_every=every)
    folder.prune(7)  # 8 and 9 are of a future that the run has gone back from
    assert folder.steps() == left


def test_folder_that_was_replaced_stays(tmp_path):
    for name in (".step_000004.old", "step_000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    checkpointer(tmp_path).clean()
    assert (tmp_path / "step_000004" / "weights").read_text() == "step_000004"
