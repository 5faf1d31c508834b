"""A checkpoint from a stranger runs nothing when it is looked at."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_irl.convert.checkpoint_reader import CheckpointReader
from megatron_irl.convert.safe_metadata import read_metadata
from megatron_irl.errors import UserError

ROOT = Path(__file__).parents[2]
UPSTREAM = DefaultLoadPlanner.load_bytes  # at collection, before anything is read


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def metadata_with(folder, value):
    folder.mkdir(exist_ok=True)
    content = pickle.dumps(Metadata({}, planner_data=value))
    (folder / ".metadata").write_bytes(content)
    return folder


@pytest.mark.parametrize("read", [read_metadata, CheckpointReader])
def test_nothing_is_run(tmp_path, read):
    folder, sign = tmp_path / "checkpoint", tmp_path / "it ran"
    metadata_with(folder, Evil(sign))
    pickle.loads((folder / ".metadata").read_bytes())
    assert sign.exists()  # as it would have been
    sign.rmdir()
    with pytest.raises(UserError, match=r"refused: its \.metadata asks for (posix|os)\.mkdir"):
        read(folder)
    assert not sign.exists()


def by_name(module, name):
    """A pickle that asks for a global, by protocol 0."""
    return f"c{module}\n{name}\n.".encode()


@pytest.mark.parametrize(("module", "name"), [
    ("builtins", "eval"), ("torch", "load"), ("torch.distributed.checkpoint.filesystem", "os"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
    ("torch.distributed.checkpoint.metadata", "os"),
    ("torch.distributed.checkpoint.planner", "LoadPlanner"), ("pathlib", "os"),
])
def test_names_beside_the_records_are_refused(tmp_path, module, name):
    (tmp_path / ".metadata").write_bytes(by_name(module, name))
    with pytest.raises(UserError, match="refused|cannot be read"):
        read_metadata(tmp_path)


def test_dotted_names_do_not_lead_out_of_a_module(tmp_path):
    content = (b"\x80\x04\x8c" + bytes([len("torch.distributed.checkpoint.metadata")])
               + b"torch.distributed.checkpoint.metadata\x8c\x09os.system\x93.")
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"refused"):
        read_metadata(tmp_path)


def test_the_tool_refuses_such_a_checkpoint(tmp_path):
    folder = metadata_with(tmp_path / "checkpoint", Evil(tmp_path / "it ran"))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert_megatron_to_hf.py", "--checkpoint", folder, "--out",
         tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "it ran").exists()


def test_objects_in_the_files_are_not_run_either(tmp_path):
    """torch's own planner runs them; after a look at the metadata it does not any more."""
    import io
    import warnings

    import torch.distributed.checkpoint as dcp

    folder, sign = tmp_path / "checkpoint", tmp_path / "it ran"
    safe = "a text"

    def load(key):
        state = {key: io.BytesIO()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=str(folder), no_dist=True)
        return state[key]

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        dcp.save({"evil": Evil(sign), "safe": safe}, checkpoint_id=str(folder), no_dist=True)
        patch.setattr(DefaultLoadPlanner, "load_bytes", UPSTREAM)
        load("evil")
        assert sign.exists()  # as it would be
    sign.rmdir()
    read_metadata(folder)
    assert load("safe") == safe
    with pytest.raises(dcp.api.CheckpointException, match="mkdir"):
        load("evil")
    assert not sign.exists()
