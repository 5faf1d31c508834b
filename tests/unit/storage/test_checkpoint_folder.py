"""A replacement of a checkpoint that was killed between its two renames loses nothing."""

from types import SimpleNamespace

from megatron_irl.storage.checkpoint import Checkpointer


def checkpointer(folder, *, is_main=True):
    return Checkpointer(folder, SimpleNamespace(is_main=is_main), keep=1)


def test_folder_moved_aside_is_put_back_by_the_main_rank(tmp_path):
    (tmp_path / ".step_000004.old").mkdir()
    (tmp_path / ".step_000004.old" / "weights").write_text("4")
    checkpointer(tmp_path, is_main=False).put_back()
    reader = checkpointer(tmp_path)  # a reader may see a replacement in progress
    assert reader.steps() == []
    reader.put_back()
    assert reader.steps() == [4]
    assert (tmp_path / "step_000004" / "weights").read_text() == "4"


def test_folder_that_was_replaced_stays(tmp_path):
    for name in (".step_000004.old", "step_000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    checkpointer(tmp_path).put_back()
    assert (tmp_path / "step_000004" / "weights").read_text() == "step_000004"
