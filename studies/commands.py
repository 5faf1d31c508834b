"""The product's command line, called in this process."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from megatron_irl.cli import main as cli

_LOG: list[Path] = []  # where what commands say goes; empty: the terminal


def command(*arguments: Any) -> None:
    """Run a command of the product; stop with its exit code if it fails."""
    words = [str(argument) for argument in arguments]
    with contextlib.ExitStack() as stack:
        if _LOG:
            _LOG[-1].parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(_LOG[-1], "a"))
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
            print("$ megatron-irl " + " ".join(words), flush=True)
        code = cli(words)
    if code:
        where = f"; see {_LOG[-1]}" if _LOG else ""
        print(f"megatron-irl {' '.join(words)} ended with {code}{where}", file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def logged(path: Path):
    """Send what commands say to a file."""
    _LOG.append(path)
    try:
        yield
    finally:
        _LOG.pop()
