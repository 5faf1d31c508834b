"""Import-time retarget of ``megatron.core`` from CUDA to the CPU.

Megatron-Core names the CUDA device directly: ``device="cuda"``, ``torch.cuda.current_device()``,
``tensor.cuda()``, ``is_cuda`` asserts, ``'torch.cuda.FloatTensor'`` type strings, pinned memory.
On a machine without a GPU an import hook rewrites those expressions in the syntax tree of
``megatron.core.*`` (and nothing else) as each module is imported; ``torch.cuda`` becomes the
stand-in :mod:`megatron_irl.hardware.fake_cuda`. torch itself stays as it is, so the user's own
code sees no difference. For the same reason the packages of CUDA kernels that NVIDIA's images have
are missing for Megatron-Core alone, and not blocked in ``sys.modules``, where transformers and trl
look for them too. Algorithms, schedules, collectives and state are Megatron's own.

Removal condition: upstream takes its device from the process group or the parameters.
"""

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import sys
import warnings
from pathlib import Path
from types import CodeType
from typing import Any

PACKAGE = "megatron.core"
STAND_IN = "__megatron_irl_cuda__"
CUDA_ONLY = frozenset({
    "transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn",
    "flash_attn_3", "flashattn_hopper", "flash_mla", "flashinfer", "fused_weight_gradient_mlp_cuda",
})


class _CudaToCpu(ast.NodeTransformer):
    """Rewrites the CUDA spellings used by Megatron-Core into their CPU equivalents."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value == "cuda":
            return ast.copy_location(ast.Constant("cpu"), node)
        if isinstance(node.value, str) and node.value.startswith("torch.cuda."):
            name = node.value.replace("torch.cuda.", "torch.")
            return ast.copy_location(ast.Constant(name), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and str(first.value).startswith("cuda:"):
            return ast.copy_location(ast.Constant("cpu"), node)
        self.generic_visit(node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda":
            return ast.copy_location(ast.Name(STAND_IN, node.ctx), node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return node

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        return next((_missing(a.name, node) for a in node.names if _is_cuda_only(a.name)), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | list[ast.stmt]:
        if node.module and not node.level and _is_cuda_only(node.module):
            return _missing(node.module, node)
        # ``_lazy_call`` above all: the real one waits, with all it was given, for CUDA to start.
        if node.module not in ("torch.cuda", "torch.cuda.nvtx"):
            return node
        source = node.module.replace("torch.cuda", STAND_IN)
        lines = [f"{alias.asname or alias.name} = {source}.{alias.name}" for alias in node.names
                 if _stand_in_has(node.module, alias.name)]
        rest = [alias for alias in node.names if not _stand_in_has(node.module, alias.name)]
        bound = [ast.copy_location(ast.parse(line).body[0], node) for line in lines]
        return bound + ([ast.ImportFrom(node.module, rest, 0)] if rest else [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        # torch refuses ``pin_memory=True`` where there is no CUDA.
        node.keywords = [k for k in node.keywords if k.arg != "pin_memory"]
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "pin_memory"):
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node


def _is_cuda_only(module: str) -> bool:
    return module.split(".")[0] in CUDA_ONLY


def _missing(module: str, node: ast.stmt) -> ast.stmt:
    """What importing a package that is not installed does; upstream is prepared for that."""
    message = f"No module named {module!r} (it needs CUDA)"
    error = ast.parse(f"raise ModuleNotFoundError({message!r}, name={module!r})").body[0]
    return ast.copy_location(error, node)


def _stand_in_has(module: str, name: str) -> bool:
    from megatron_irl.hardware import fake_cuda

    owner = fake_cuda.nvtx if module.endswith(".nvtx") else fake_cuda
    return hasattr(owner, name)


def retarget_source(source: bytes | str, path: str) -> CodeType:
    """Compile ``source`` with CUDA spellings turned into CPU ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # upstream's docstrings, on every import
        tree = _CudaToCpu().visit(ast.parse(source, path))
    # The stand-in must be bound before any other statement, but after __future__ imports.
    position = 0
    for position, statement in enumerate(tree.body):  # noqa: B007
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not (is_docstring or is_future):
            break
    binding = ast.parse(f"from megatron_irl.hardware import fake_cuda as {STAND_IN}").body
    tree.body[position:position] = binding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # upstream's docstrings, on every import
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Bypasses __pycache__: its entries hold the CUDA code and serve other programs.
        path = self.get_filename(fullname)
        source = self.get_data(path)
        cached = _cache_folder() / (_cache_key(source, path) + ".bin")
        try:
            code = marshal.loads(cached.read_bytes())
        except (OSError, ValueError, EOFError, TypeError):
            code = None
        if not isinstance(code, CodeType):  # not there, or damaged
            # Ranks that start together may all do this; each stores a whole file by a rename.
            code = retarget_source(source, path)
            _store(cached, marshal.dumps(code))
        return code


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_irl" / "retarget"


def _cache_key(source: bytes, path: str) -> str:
    """Names the compiled form: upstream's text, where it lies, this file, and the interpreter."""
    parts = (source, path.encode(), Path(__file__).read_bytes(), importlib.util.MAGIC_NUMBER)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _store(path: Path, content: bytes) -> None:
    """Best effort: parsing 240 files costs seconds, but a read-only home must not matter."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Install the import hook; must run before the first import of ``megatron.core``.

    Raises:
        RuntimeError: ``megatron.core`` is already imported, so CUDA code would stay in place.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_irl.hardware on a machine without CUDA; "
            "import megatron_irl.hardware first."
        )
    sys.meta_path.insert(0, _Finder())
