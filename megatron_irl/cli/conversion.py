"""What the two conversion tools share: the plan on the screen, and progress while it runs."""

import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from megatron_irl.convert.stream import Conversion
from megatron_irl.errors import UserError


def run_conversion(conversion: Conversion, *, dry_run: bool) -> None:
    """Print the plan, then run it unless ``dry_run``.

    Raises:
        UserError: Several ranks were started; what the conversion refuses.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but one process converts a model of any "
            "size. Start the tool without torchrun."
        )
    sys.stdout.write("\n".join(conversion.plan) + "\n")
    if dry_run:
        return
    # Off where standard error is no terminal.
    with tqdm(total=conversion.total_bytes, unit="B", unit_scale=True, disable=None) as bar:

        def advance(label: str, nbytes: int) -> None:
            bar.set_postfix_str(label, refresh=False)
            bar.update(nbytes)

        conversion.run(advance)


def run_tool(name: str, work: Callable[[], None]) -> int:
    """Run a tool's work; returns the exit code. One message, no traceback, for what users do."""
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; start the same command again to go on\n")
        return 1
    return 0
