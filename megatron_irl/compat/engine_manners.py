"""What Megatron's engine does to a process that is not its own: signal handlers and a bar.

Importing the engine makes SIGTERM and SIGINT dump a stack (megatron-core 0.19.2, its
``data_parallel_inference_coordinator``), though ending a run is no crash; capturing graphs draws a
progress bar on the user's terminal. Goes when upstream registers the handlers in the coordinator's
own process, and its bar has a switch.
"""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_irl import hardware  # noqa: F401  (must precede megatron)

from megatron.core.inference.engines import dynamic_engine  # isort: skip

for _number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(_number)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within the block graphs are captured in silence."""
    old, dynamic_engine.HAVE_TQDM = dynamic_engine.HAVE_TQDM, False
    try:
        yield
    finally:
        dynamic_engine.HAVE_TQDM = old
