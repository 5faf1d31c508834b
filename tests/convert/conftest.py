"""Tiny models of a test module, by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model, made once for the module, as its ``options_of`` has it."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_llama(root / name, **request.module.options_of(name))
        return made[name]

    return make
