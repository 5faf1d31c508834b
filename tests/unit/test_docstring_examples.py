"""Examples in docstrings call what there is, the way it can be called; the public entries have one.

Read from the source alone: a call in an example must fit a function, method or class of that name.
"""

import ast
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_irl"
FILES = sorted(PACKAGE.rglob("*.py"))
# A dozen, and some more: what somebody who builds on the package meets first.
PUBLIC = {
    "load_recipe", "train", "Run", "RunFolder", "Policy", "Stepper", "Trainer", "MegatronGenerator",
    "build_chunks", "response_logprobs", "irft_loss", "PairBank", "RoundPairs", "Checkpointer",
    "Lease", "export_hf", "on_main", "Algorithm", "rules_of", "Adapters",
}


def definitions():
    """Every function, method and class of the package: (qualified name, node, whether a method)."""
    for path in FILES:
        module = ast.parse(path.read_text())
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                yield node.name, node, False
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        yield inner.name, inner, True
        for node in module.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, node, False


DEFINITIONS = list(definitions())


def example_of(node):
    """The code under ``Example:`` of a docstring, as text; None without one."""
    text = ast.get_docstring(node) or ""
    if "Example:\n" not in text:
        return None
    lines, kept = text.split("Example:\n", 1)[1].splitlines(), []
    for line in lines:
        if line.strip() and not line.startswith("    "):
            break  # the next section
        kept.append(line)
    if any(line.endswith("::") for line in kept):  # words around the code, which is indented
        kept = [line for line in kept if not line.strip() or line.startswith(8 * " ")]
    return textwrap.dedent("\n".join(kept)).strip("\n").replace("``", "")


EXAMPLES = {node.name: example_of(node) for _, node, _ in DEFINITIONS if example_of(node)}


def can_be_called(call, node, *, is_method):
    """Whether the arguments of a call fit a function, or the constructor of a class."""
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not made:  # a dataclass, or what its base has
            fields = [n.target.id for n in node.body
                      if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            return all(k.arg in fields for k in call.keywords) or not fields
        (node,), is_method = made, True
    names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
    if is_method and not any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list):
        names = names[1:]
    given = {k.arg for k in call.keywords}
    only = {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)}
    if any(isinstance(a, ast.Starred) for a in call.args) or None in given:
        return True
    if any(isinstance(a, ast.Constant) and a.value is ... for a in call.args):
        return True  # (...): arguments left out
    required = names[: len(names) - len(node.args.defaults)]
    return (
        (len(call.args) <= len(names) or node.args.vararg is not None)
        and (given <= set(names[len(call.args) :]) | set(only) or node.args.kwarg is not None)
        and set(required[len(call.args) :]) <= given
        and {name for name, default in only.items() if default is None} <= given
    )


def test_the_public_entries_have_one():
    assert set(EXAMPLES) >= PUBLIC
    assert len(PUBLIC) >= 12


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_calls_what_there_is(name):
    calls = [n for n in ast.walk(ast.parse(EXAMPLES[name])) if isinstance(n, ast.Call)]
    made_here = {n.name for n in ast.walk(ast.parse(EXAMPLES[name]))
                 if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    checked = 0
    for call in calls:
        is_method = isinstance(call.func, ast.Attribute)
        called = call.func.attr if is_method else getattr(call.func, "id", "")
        fits = [can_be_called(call, node, is_method=m) for known, node, m in DEFINITIONS
                if known == called and (m or not is_method or isinstance(node, ast.ClassDef))
                and not (m and not is_method)]
        assert not fits or any(fits), f"{ast.unparse(call)} fits no {called}"
        checked += bool(fits) or called in made_here
    assert checked, f"no call of the example is known: {EXAMPLES[name]}"
