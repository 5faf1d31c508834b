"""The CPU retarget: what is rewritten, what is left alone, and the cache of compiled modules."""

import marshal
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_irl import hardware
from megatron_irl.hardware import fake_cuda, retarget

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(hardware.IS_CUDA, reason="with CUDA nothing is retargeted")


def execute(source: str, **names):
    """Run ``source`` as ``megatron.core`` would be; returns its names."""
    space = {"torch": torch, **names}
    exec(retarget.retarget_source(source, "upstream.py"), space)
    return space


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"cuda"', "cpu"),
        ('torch.zeros(2, device="cuda").device.type', "cpu"),
        ('f"cuda:{1 + 1}"', "cpu"),
        ('f"{1}-cuda:"', "1-cuda:"),
        ('"cudagraph"', "cudagraph"),
        ('"torch.cuda.FloatTensor"', "torch.FloatTensor"),
        ('torch.zeros(1).type() == "torch.cuda.FloatTensor"', True),
        ("torch.cuda", fake_cuda),
        ("torch.cuda.current_device()", torch.device("cpu")),
        ("torch.cuda.is_available()", True),
        ("torch.zeros(1).is_cuda", True),
        ("torch.zeros(1).cuda().device.type", "cpu"),
        ("torch.zeros(1).cuda(3, non_blocking=True).device.type", "cpu"),
        ("torch.zeros(1).pin_memory().is_pinned()", False),
        ("torch.zeros(1, pin_memory=True).is_pinned()", False),
        ('torch.zeros(1).to("cuda", non_blocking=True).device.type', "cpu"),
        ('torch.zeros(1, device=f"cuda:{0}").device.type', "cpu"),
        ("torch.cuda.nvtx.range_push('x')", 0),
    ],
)
def test_expression(source, expected):
    assert execute(f"value = {source}")["value"] == expected


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("from torch.cuda import _lazy_call, _lazy_init", "_lazy_call", fake_cuda._lazy_call),
        ("from torch.cuda import current_device as here", "here", fake_cuda.current_device),
        ("from torch.cuda.nvtx import range_push", "range_push", fake_cuda.nvtx.range_push),
        ("from torch.cuda import CudaError", "CudaError", torch.cuda.CudaError),  # no stand-in
        ("def f(x=torch.cuda.device_count()): return x\nvalue = f()", "value", 1),
    ],
)
def test_statement(source, name, expected):
    assert execute(source)[name] is expected or execute(source)[name] == expected


@pytest.mark.parametrize(
    "statement",
    [
        "import apex",
        "import os, amp_C",
        "import transformer_engine.pytorch as te",
        "from flash_attn.cute import flash_attn_varlen_func",
        "def f():\n    from transformer_engine import pytorch\nf()",
    ],
)
def test_packages_of_cuda_kernels_are_missing(monkeypatch, statement):
    for name in ("apex", "amp_C", "transformer_engine", "flash_attn"):  # not found by any other way
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ModuleNotFoundError, match="needs CUDA"):
        execute(statement)


def test_a_module_of_upstream_named_like_such_a_package_is_not():
    space = {"__package__": "megatron.core.extensions", "__name__": "x"}
    execute("from .transformer_engine import HAVE_TE", **space)


NVIDIA_IMAGE = """
import importlib.util, sys
from megatron_irl import hardware
import megatron.core.optimizer, megatron.core.transformer.attention
import megatron.core.extensions.transformer_engine as extension
assert not extension.HAVE_TE
assert "transformer_engine" not in sys.modules and "flash_attn" not in sys.modules
assert importlib.util.find_spec("flash_attn")  # what transformers asks
print("megatron is imported", flush=True)
import transformer_engine
"""


def test_on_cpu_megatron_takes_no_cuda_kernels_of_nvidias_image(tmp_path):
    """The user's own code can still import them."""
    for name in ("transformer_engine", "flash_attn", "apex", "amp_C"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"print('imported {name}')")
    done = subprocess.run(
        [sys.executable, "-c", NVIDIA_IMAGE], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "MEGATRON_IRL_PLATFORM": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "megatron is imported\nimported transformer_engine\n"


def test_a_from_import_with_and_without_stand_ins():
    space = execute("from torch.cuda import CudaError, device_count")
    assert space["CudaError"] is torch.cuda.CudaError
    assert space["device_count"] is fake_cuda.device_count


def test_arguments_of_cuda_calls_are_not_evaluated_for_the_copy():
    class Tensor:
        def cpu(self):
            return "moved"

    assert execute("value = t.cuda(device=0)", t=Tensor())["value"] == "moved"


def test_docstring_and_future_imports_stay_first():
    space = execute('"""The docstring."""\nfrom __future__ import annotations\nvalue: Absent = 1\n')
    assert space["__doc__"] == "The docstring." and space["value"] == 1
    assert execute("")[retarget.STAND_IN] is fake_cuda


def test_line_numbers_survive():
    with pytest.raises(ZeroDivisionError) as caught:
        execute("value = 1\n\nother = torch.cuda.device_count() / 0\n")
    assert caught.traceback[-1].lineno == 2  # 0-based: the third line


def test_torch_itself_is_untouched():
    import megatron.core.utils as upstream

    assert upstream.__dict__[retarget.STAND_IN] is fake_cuda
    assert isinstance(torch.cuda, types.ModuleType) and torch.cuda.__name__ == "torch.cuda"
    assert torch.cuda is not fake_cuda
    assert torch.cuda.is_available() is False
    assert torch.zeros(1).is_cuda is False
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    assert torch.zeros.__module__ is None or "megatron" not in torch.zeros.__module__
    everything = [n for n in sys.modules if n.split(".")[0] == "torch"]
    assert not any(retarget.STAND_IN in vars(sys.modules[n]) for n in everything)


def test_only_megatron_core_is_found():
    finder = next(f for f in sys.meta_path if isinstance(f, retarget._Finder))
    assert finder.find_spec("torch.cuda", None) is None
    assert finder.find_spec("megatron", None) is None
    assert finder.find_spec("megatron.corelike", None) is None
    assert finder.find_spec("megatron.core.nothing", []) is None


def test_installing_twice_adds_one_finder():
    retarget.install()
    assert sum(isinstance(f, retarget._Finder) for f in sys.meta_path) == 1


def test_too_late_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path
                                           if not isinstance(f, retarget._Finder)])
    import megatron.core  # noqa: F401

    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match="import megatron_irl.hardware first"):
        retarget.install()
    assert sys.meta_path == before


PROBE = """
import os, sys, torch
torch.cuda.is_available = lambda: {cuda}  # the machine, as torch sees it
from megatron_irl import hardware
from megatron_irl.hardware import retarget
found = any(isinstance(f, retarget._Finder) for f in sys.meta_path)
assert "megatron" not in sys.modules
print(hardware.IS_CUDA, hardware.BACKEND, found)
"""


@pytest.mark.parametrize(
    ("cuda", "forced", "expected"),
    [
        (True, None, "True nccl False"),
        (True, "cpu", "False gloo True"),
    ],
)
def test_installed_only_where_the_platform_is_the_cpu(cuda, forced, expected):
    environment = {k: v for k, v in os.environ.items() if k != "MEGATRON_IRL_PLATFORM"}
    if forced:
        environment["MEGATRON_IRL_PLATFORM"] = forced
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(cuda=cuda)], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a module of CUDA code that is loaded through it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "upstream.py"
    source.write_text("value = torch.cuda.current_device()\n")
    return retarget._Loader("upstream", str(source)), source, tmp_path / "cache"


def value_of(loader):
    space = {"torch": torch}
    exec(loader.get_code("upstream"), space)
    return str(space["value"])


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_cache_is_written_once_and_used(cache, monkeypatch):
    loader, _, folder = cache
    assert value_of(loader) == "cpu"
    (entry,) = entries(folder)
    assert entry.parent == folder / "megatron_irl" / "retarget"
    calls = []
    monkeypatch.setattr(retarget, "retarget_source", lambda *a: calls.append(a))
    assert value_of(loader) == "cpu" and calls == []
    assert entries(folder) == [entry]


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not marshal", b"\xe3" + b"\xff" * 64, "truncated", "another type"]
)
def test_damaged_entry_is_made_again(cache, content):
    loader, _, folder = cache
    assert value_of(loader) == "cpu"
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    if content == "truncated":
        content = whole[: len(whole) // 2]
    if content == "another type":
        content = marshal.dumps([1, 2])
    entry.write_bytes(content)
    assert value_of(loader) == "cpu"
    assert entry.read_bytes() == whole


def test_changed_source_is_compiled_anew(cache):
    loader, source, folder = cache
    assert value_of(loader) == "cpu"
    source.write_text("value = torch.cuda.device_count()\n")
    assert value_of(loader) == "1"
    assert len(entries(folder)) == 2


def test_cache_that_cannot_be_written_does_not_matter(cache):
    loader, _, folder = cache
    folder.write_text("a file where the folder should be")
    assert value_of(loader) == "cpu"
    assert folder.read_text().startswith("a file")


def test_pycache_of_upstream_is_left_alone(cache):
    loader, source, _ = cache
    assert value_of(loader) == "cpu"
    assert not (source.parent / "__pycache__").exists()
