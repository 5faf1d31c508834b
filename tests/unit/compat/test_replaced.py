"""What is replaced for a while comes back as it was, wherever it stood."""

from types import SimpleNamespace

import pytest

from megatron_irl.compat.replaced import replaced


class Base:
    level = 1

    @staticmethod
    def named(text):
        return f"base {text}"


class Derived(Base):
    pass


def test_owners_have_again_what_they_had():
    config = SimpleNamespace(fp8="hybrid")
    with replaced((config, "fp8", None), (Derived, "level", 2), (Base, "named", str.upper)):
        assert (config.fp8, Derived.level, Base.level) == (None, 2, 1)
        assert Derived.named("a") == "A"
    assert config.fp8 == "hybrid" and "level" not in vars(Derived)
    assert isinstance(vars(Base)["named"], staticmethod) and Base().named("a") == "base a"


def test_also_after_an_error_and_where_one_is_named_twice():
    config = SimpleNamespace(size=4)
    with pytest.raises(ZeroDivisionError), replaced((config, "size", 2), (config, "size", 1)):
        raise ZeroDivisionError(config.size)
    assert config.size == 4


def test_a_name_that_upstream_has_no_more_is_not_passed_over():
    config = SimpleNamespace(size=4)
    with pytest.raises(AttributeError, match="width"), replaced(
        (config, "size", 2), (config, "width", 1)
    ):
        pass
    assert vars(config) == {"size": 4}
