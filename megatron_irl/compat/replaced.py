"""Attributes of upstream's modules, classes and objects that are others for a while.

Goes when upstream is told by arguments what it now reads from its configuration, its modules and
its classes while it generates or is planned with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOT_ITS_OWN = object()


@contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Within the block each (owner, name, value) holds.

    Afterwards each owner has what it had, or inherits it again.

    Raises:
        AttributeError: There is no such name any more: what it stood for would go on unseen.
    """
    for owner, name, _ in places:
        getattr(owner, name)
    # Not what ``getattr`` gives: of a class that is bound already, or a base's.
    before = [(owner, name, vars(owner).get(name, _NOT_ITS_OWN)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _NOT_ITS_OWN:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
