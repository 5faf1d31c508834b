"""A replacement of a checkpoint that was killed between its two renames loses nothing."""

from types import SimpleNamespace

from megatron_irl.checkpoint import Checkpointer


def test_folder_moved_aside_is_put_back(tmp_path):
    (tmp_path / ".step_000004.old").mkdir()
    (tmp_path / ".step_000004.old" / "weights").write_text("4")
    rank = SimpleNamespace(is_main=False)
    assert Checkpointer(tmp_path, rank, keep=1).steps() == []  # the main rank's business
    assert Checkpointer(tmp_path, SimpleNamespace(is_main=True), keep=1).steps() == [4]
    assert (tmp_path / "step_000004" / "weights").read_text() == "4"


def test_folder_that_was_replaced_stays(tmp_path):
    for name in (".step_000004.old", "step_000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    Checkpointer(tmp_path, SimpleNamespace(is_main=True), keep=1)
    assert (tmp_path / "step_000004" / "weights").read_text() == "step_000004"
