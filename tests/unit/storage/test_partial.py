"""Lines written over several starts: whole ones are kept, torn ones cut, strangers kept out."""

import errno

import pytest

from megatron_irl.errors import UserError
from megatron_irl.storage import partial as module
from megatron_irl.storage.partial import PartialJsonl

SETTINGS = {"seed": 1, "stop_ids": (2, 3)}
RECORDS = [{"text": f"line {i}\n\0é"} for i in range(4)]


def opened(path, settings=SETTINGS, done=0):
    lines = PartialJsonl(path, settings)
    assert lines.begin() == done
    return lines


def test_written_over_two_starts(tmp_path):
    out = tmp_path / "out.jsonl"
    first = opened(out)
    first.append(RECORDS[:1])
    first.append(RECORDS[1:3])
    first.close()
    assert not out.exists()
    second = opened(out, done=3)
    second.append(RECORDS[3:])
    second.finish()
    second.close()
    assert out.read_bytes() == b"".join(map(module.json_line, RECORDS))
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("torn", [b"{", b'{"text": "half', b'{"text"\n', b"\0" * 40,
                                  b'{"text": "\0\0\0"}\n'])
def test_torn_end_is_cut_off(tmp_path, torn):
    lines = opened(tmp_path / "out.jsonl")
    lines.append(RECORDS[:2])
    lines.close()
    with open(lines.folder / "lines.jsonl", "ab") as file:
        file.write(torn)
    again = opened(tmp_path / "out.jsonl", done=2)
    again.append(RECORDS[2:])
    again.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(map(module.json_line, RECORDS))


def test_other_settings_are_refused_once_there_is_something_to_lose(tmp_path):
    out = tmp_path / "out.jsonl"
    opened(out, {"seed": 5}).close()
    lines = opened(out)  # no line was written
    lines.append(RECORDS)
    lines.close()
    other = PartialJsonl(out, {"seed": 2, "stop_ids": [2, 3]})
    with pytest.raises(UserError, match=r"4 finished lines .*: seed=1 there and 2 now\. Start"):
        other.begin()
    other.close()
    opened(out, done=4).close()


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[1, 2]"])
def test_settings_that_cannot_be_read_keep_the_lines(tmp_path, text):
    out = tmp_path / "out.jsonl"
    lines = opened(out)
    lines.append(RECORDS)
    lines.close()
    (lines.folder / "settings.json").write_text(text)
    again = PartialJsonl(out, {"seed": 1})
    with pytest.raises(UserError, match=r"settings\.json cannot be read .* 4 finished lines"):
        again.begin()
    again.close()
    assert (lines.folder / "lines.jsonl").read_bytes().count(b"\n") == 4


def test_second_process_is_refused(tmp_path):
    first = opened(tmp_path / "out.jsonl")
    second = PartialJsonl(tmp_path / "out.jsonl", SETTINGS)
    with pytest.raises(UserError, match="written by another process"):
        second.begin()
    second.close()
    first.close()
    opened(tmp_path / "out.jsonl").close()


def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    lines = opened(tmp_path / "out.jsonl")
    lines.append(RECORDS[:2])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(UserError, match="No space left.*start the same command again"):
            lines.append(RECORDS[2:3])
    lines.close()
    assert PartialJsonl(tmp_path / "out.jsonl", SETTINGS).begin() >= 2


def test_link_keeps_pointing_at_the_file(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.jsonl", tmp_path / "far" / "out.jsonl"
    link.symlink_to(target)
    lines = opened(link)
    lines.append(RECORDS)
    lines.finish()
    assert link.is_symlink() and len(target.read_bytes().splitlines()) == 4


def test_folder_in_the_way(tmp_path):
    with pytest.raises(UserError, match="not a regular file"):
        PartialJsonl(tmp_path, SETTINGS).begin()
