"""What a recipe may write where Megatron's own dataclasses take the value."""

import dataclasses

import pytest

from megatron_irl.config import check_open_section
from megatron_irl.errors import UserError


@dataclasses.dataclass
class Upstream:
    """Annotated as Megatron's configurations are: not all of them truly."""

    decay: float = None
    layers: int | None = None
    overlap: bool = False
    every: int | list[int] = 1
    kind: str | bool = "x"


@pytest.mark.parametrize("values", [
    {"decay": 0.1}, {"decay": 1}, {"decay": None}, {"layers": 3}, {"layers": None},
    {"overlap": True}, {"overlap": 1}, {"every": [1, 2]}, {"every": "([1]*2)"}, {"kind": "y"},
])
def test_what_a_field_may_take(values):
    check_open_section("optimizer", values, Upstream)


@pytest.mark.parametrize(("values", "said"), [
    ({"decay": "abc"}, "optimizer.decay='abc' is a string; optimizer.decay takes a number."),
    ({"decay": True}, "optimizer.decay=True is a boolean; optimizer.decay takes a number."),
    ({"layers": 1e3}, "optimizer.layers=1000.0 is a number; optimizer.layers takes an integer."),
    ({"overlap": "yes"},
     "optimizer.overlap='yes' is a string; optimizer.overlap takes true or false."),
    ({"decai": 1}, "unknown key optimizer.decai; did you mean optimizer.decay?"),
])
def test_what_it_may_not(values, said):
    with pytest.raises(UserError) as raised:
        check_open_section("optimizer", values, Upstream)
    assert str(raised.value) == said
