"""Files and folders appear whole; what a disk refuses is one message, whoever met it."""

import errno
import os
import resource

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import (
    commit_folder,
    disk_error,
    put_back,
    replacing_folder,
    write_errors,
    write_file,
)

FULL = os.strerror(errno.ENOSPC)


def caused(error, cause):
    error.__cause__ = cause
    return error


ERRORS = {
    "system call": (OSError(errno.ENOSPC, "x"), FULL),
    "file-size limit": (OSError(errno.EFBIG, "x"), os.strerror(errno.EFBIG)),
    "quota": (OSError(errno.EDQUOT, "x"), os.strerror(errno.EDQUOT)),
    "of Rust": (RuntimeError("I/O error: os error 28"), FULL),
    "of another process": (RuntimeError("Worker failure: [Errno 27] File too large"),
                           os.strerror(errno.EFBIG)),
    "in words": (ValueError(f"write failed: {FULL}"), FULL),
    "a cause": (caused(RuntimeError("x"), OSError(errno.ENOSPC, "x")), FULL),
    "of another rank": (
        CheckpointException("write", {1: (RuntimeError("Worker failure: [Errno 28] x"), None)}),
        FULL,
    ),
    "another file's absence": (FileNotFoundError(errno.ENOENT, "x"), None),
    "a network's": (ConnectionResetError(errno.ECONNRESET, "x"), None),
    "nothing of a disk": (KeyError("x"), None),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_disk_says_is_found(name):
    error, said = ERRORS[name]
    assert disk_error(error) == said
    if not isinstance(error, Exception):
        return
    expected = UserError if said else type(error)
    with pytest.raises(expected) as raised, write_errors("/some/path", "Do this."):
        raise error
    if said:
        assert str(raised.value) == f"cannot write /some/path: {said}. Do this."


def test_a_file_size_limit_is_one_message(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_file(tmp_path / "file", b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*file: File too large"):
            write_file(tmp_path / "file", b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_or_not(tmp_path):
    final = tmp_path / "hf"
    with replacing_folder(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    with pytest.raises(UserError, match=FULL), replacing_folder(final) as folder:
        (folder / "a").write_text("2")
        raise OSError(errno.ENOSPC, "x")
    assert (final / "a").read_text() == "1" and os.listdir(tmp_path) == ["hf"]
    with replacing_folder(final) as folder:
        (folder / "b").write_text("3")
    assert os.listdir(final) == ["b"] and os.listdir(tmp_path) == ["hf"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    final, new = tmp_path / "hf", tmp_path / "new"
    for folder, text in ((final, "old"), (new, "new")):
        folder.mkdir()
        (folder / "a").write_text(text)
    original = os.replace

    def replace(source, target):
        if source == new:
            raise Killed
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        commit_folder(new, final)
    assert not final.exists()
    put_back(final)
    assert (final / "a").read_text() == "old"
    commit_folder(new, final)
    put_back(final)
    assert (final / "a").read_text() == "new" and os.listdir(tmp_path) == ["hf"]
