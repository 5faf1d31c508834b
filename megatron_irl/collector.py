"""Python's cyclic garbage collector, kept out of where the device would wait for it.

A step makes hundreds of thousands of objects, so collections start in its midst, and each full one
goes through everything that is alive: on one H100 they cost a step of a 1.1 B model over a tenth
of its time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_is_kept = False


@contextmanager
def no_collection() -> Iterator[None]:
    """Within the block nothing is collected; reference counts free what is in no cycle, as ever."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def keep_aside() -> None:
    """Have collections pass over what is alive now, to the end of the process.

    For one that runs much after its imports: they are a million objects, and every full collection
    would go through them.
    """
    global _is_kept
    gc.collect()
    gc.freeze()
    _is_kept = True


@contextmanager
def settled() -> Iterator[None]:
    """Within the block collections pass over what is alive at its beginning.

    For a run that has been built: models, optimizer and libraries stay to its end. Python takes
    back all that is set aside or none of it, so after ``keep_aside`` a run adds nothing to that.
    """
    gc.collect()
    if _is_kept:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
