"""The house keeps its shape: imports go down, one door to the hardware, one reader of groups."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_irl.algorithms.registry import REGISTRY
from megatron_irl.config.run_files import IDENTITY, RECIPE

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_irl"
PRODUCT = sorted(p for top in (PACKAGE, "tools", "examples", "studies")
                 for p in (ROOT / top).rglob("*.py"))
SOURCES = PRODUCT + sorted((ROOT / "tests").rglob("*.py"))

FLOORS = [
    ("types", "objectives", "errors", "config.schema", "config.data_schema", "config.run_schema",
     "config.bounds", "families", "convert.hf_config", "convert.hf_folder", "convert.peft_folder",
     "convert.weights_digest"),
    ("algorithms.registry", "algorithms.rules"),
    ("config",),
    ("flops", "hardware", "compat", "collector", "console", "timing", "parallel", "storage.commit",
     "storage.partial", "storage.tables", "data"),
    ("model", "generation", "storage", "convert", "adapters"),
    ("policy",),
    ("train", "evaluation"),
    ("algorithms",),
    ("planning",),
    ("run",),
    ("bench",),
    ("cli", "__main__"),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_MEGATRON = [*FLOORS[0], *FLOORS[1], *FLOORS[2], "data", "console"]

# path::function -> why it may exceed 60 lines
LONG_FUNCTIONS = {
    f"{PACKAGE}/objectives/irft.py::irft_loss": "half of it is the docstring with the formulas",
    f"{PACKAGE}/objectives/policy_gradient.py::policy_gradient_loss": "likewise",
    f"{PACKAGE}/data/packing.py::pack": "a third of it is the docstring",
}
# path -> why it may name torch.cuda
KNOWS_CUDA: dict[str, str] = {}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if name.startswith(PACKAGE) and is_module(name)}
            found |= inner if inner and len(inner) == len(names) else inner | {module}
    return found


def room(module: str) -> str | None:
    """The room of FLOORS that owns one of our modules; None for the bare package."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        name = ".".join(parts[:length])
        if name in FLOOR_OF:
            return name
    assert not parts, f"{module} stands on no floor; add its room to FLOORS"
    return None


def edges() -> list[tuple[str, str, str]]:
    """(file, importing room, imported room) of the package, within a room left out."""
    found = []
    for path in PRODUCT:
        module = module_of(path)
        if not module.startswith(PACKAGE):
            continue
        own = room(module)
        for name in sorted(imports_of(path)):
            if name.split(".")[0] == PACKAGE:
                other = room(name)
                if own and other and own != other:
                    found.append((relative(path), own, other))
    return found


def test_imports_go_down():
    assert len(edges()) > 100, "the imports are not being found"
    wrong = [edge for edge in edges() if FLOOR_OF[edge[2]] > FLOOR_OF[edge[1]]]
    assert wrong == []


def test_rooms_of_a_floor_do_not_import_each_other_in_a_circle():
    beside = {(a, b) for _, a, b in edges() if FLOOR_OF[a] == FLOOR_OF[b]}
    beside = {(a.split(".")[0], b.split(".")[0]) for a, b in beside}
    beside = {(a, b) for a, b in beside if a != b}
    reached = set(beside)
    for _ in beside:
        reached |= {(a, d) for a, b in reached for c, d in beside if b == c}
    assert [a for a, b in reached if a == b] == []


def test_inference_and_evaluation_stand_on_the_policy_alone():
    """Who scores or generates must not need an optimizer, nor a run."""
    users = [ROOT / PACKAGE / "cli" / f"{name}.py" for name in (
        "inference", "generate", "verification", "filter")]
    users += [p for p in PRODUCT if in_room(p, "evaluation") or in_room(p, "policy")]
    reached = {room(n) for p in users for n in imports_of(p) if n.startswith(f"{PACKAGE}.")}
    assert "policy" in reached
    assert reached.isdisjoint({"train", "run", "algorithms"})


def test_package_is_not_imported_from_below_by_its_tools():
    """Nothing in the package imports tools, examples or tests."""
    tops = {"tools", "examples", "tests"}
    wrong = [
        relative(path) for path in PRODUCT if module_of(path).startswith(PACKAGE)
        if {name.split(".")[0] for name in imports_of(path)} & tops
    ]
    assert wrong == []


def mentions(path: Path, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == name
        or isinstance(node, ast.Name) and node.id == name
        or isinstance(node, ast.alias) and name in (node.name.split(".")[-1], node.asname)
        or isinstance(node, ast.ImportFrom) and name in (node.module or "").split(".")
        for node in ast.walk(tree(path))
    )


def in_room(path: Path, name: str) -> bool:
    return path.is_relative_to(ROOT / PACKAGE / name)


def test_only_parallel_reads_parallel_state():
    readers = [p for p in PRODUCT if mentions(p, "parallel_state")]
    assert any(in_room(p, "parallel") for p in readers)
    assert [relative(p) for p in readers if not in_room(p, "parallel")] == []


def patches_in(path: Path) -> list[str]:
    """Assignments to attributes of what a file imports from Megatron or torch."""
    nodes = list(ast.walk(tree(path)))
    foreign = {
        (alias.asname or alias.name).split(".")[0] for node in nodes
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in ("megatron", "torch")
    }
    targets = [target for node in nodes if isinstance(node, ast.Assign | ast.AugAssign)
               for each in (node.targets if isinstance(node, ast.Assign) else [node.target])
               for target in ast.walk(each)]
    return [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)
            and isinstance(t.ctx, ast.Store) and ast.unparse(t).split(".")[0] in foreign]


def test_upstream_is_patched_in_one_room():
    """With its reason, and the condition on which it goes."""
    package = [p for p in PRODUCT if module_of(p).startswith(PACKAGE)]
    patching = {relative(p): patches_in(p) for p in package if patches_in(p)}
    assert len(patching) >= 4
    assert {name: found for name, found in patching.items()
            if not in_room(ROOT / name, "compat")} == {}
    for path in package:
        if in_room(path, "compat") and path.name != "__init__.py":
            said = " ".join((ast.get_docstring(tree(path)) or "").split())
            assert re.search(r"(?i)to be removed when|goes when|removal condition", said), path


def test_a_run_folders_own_files_are_named_in_one_place():
    """``run`` writes them, and rooms below and above it read them."""
    package = [p for p in PRODUCT if module_of(p).startswith(PACKAGE)]
    said = {relative(p): strings_in(p) & {RECIPE, IDENTITY} for p in package}
    assert {path for path, names in said.items() if names} == {f"{PACKAGE}/config/run_files.py"}


def strings_in(path: Path) -> set[str]:
    """Strings that a file holds, outside of documentation."""
    nodes = list(ast.walk(tree(path)))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return {
        node.value for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and id(node) not in documentation
    }


def algorithm_names_in(path: Path) -> set[str]:
    """Names of algorithms that a file holds as strings, outside of documentation."""
    return strings_in(path) & set(REGISTRY)


def test_only_algorithms_know_algorithms_by_name():
    """Elsewhere one asks the algorithm what it is, never what it is called."""
    package = [p for p in PRODUCT if module_of(p).startswith(PACKAGE)]
    assert all(algorithm_names_in(ROOT / PACKAGE / "algorithms" / f"{n}.py") for n in REGISTRY)
    assert [relative(p) for p in package
            if not in_room(p, "algorithms") and algorithm_names_in(p)] == []


LIGHT = """
import sys
from megatron_irl.algorithms.registry import all_rules
from megatron_irl.config import load_recipe
assert len(all_rules()) >= 4
loaded = {name.split(".")[0] for name in sys.modules}
heavy = {"torch", "megatron", "transformers", "pyarrow"} & loaded
assert not heavy, heavy
"""


def test_reading_a_recipe_needs_neither_torch_nor_megatron():
    """A launcher reads the recipe in a moment; the algorithms' files must not make it wait."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def names_cuda(path: Path) -> bool:
    """Reaches for CUDA: ``torch.cuda``, ``x.cuda()``, ``is_cuda`` or a device called "cuda"."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value == "cuda" or node.value.startswith("cuda:"):
                return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
            return True
        if isinstance(node, ast.Import) and any(a.name == "torch.cuda" for a in node.names):
            return True
    return mentions(path, "cuda") or mentions(path, "is_cuda")


def test_only_platform_knows_the_device():
    knowing = {relative(p) for p in PRODUCT if names_cuda(p) and not in_room(p, "hardware")}
    assert any(names_cuda(p) for p in PRODUCT if in_room(p, "hardware"))
    assert knowing == KNOWS_CUDA.keys()


BLOCKED = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
try:
    import megatron_irl.parallel.topology
except ImportError as error:
    assert "blocked" in str(error), error
else:
    raise AssertionError("megatron was not blocked")
"""


def test_ground_floor_needs_no_megatron():
    rooms = [f"{PACKAGE}.{name}" for name in WITHOUT_MEGATRON if name != "convert"]
    names = [
        module_of(p) for p in PRODUCT
        if any(module_of(p) == r or module_of(p).startswith(r + ".") for r in rooms)
    ]
    assert len(names) > 15
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_is_short(path):
    assert path.name not in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")
    assert len(path.read_text().splitlines()) <= 350


def test_functions_are_short():
    long = {
        f"{relative(path)}::{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None and node.end_lineno - node.lineno >= 60
    }
    assert {name: n for name, n in long.items() if name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= set(long), "an exception is no longer needed"
    assert all(long[name] <= 80 for name in LONG_FUNCTIONS)


def test_files_are_no_longer_than_those_of_the_first_release():
    """Median and 90th percentile of the package, without ``__init__.py``, at eef3551: 127, 251."""
    lengths = sorted(len(p.read_text().splitlines()) for p in PRODUCT
                     if module_of(p).startswith(PACKAGE) and p.name != "__init__.py")
    assert lengths[len(lengths) // 2] <= 127
    assert lengths[len(lengths) * 9 // 10] <= 251
