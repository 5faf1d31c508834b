"""A run whose second checkpoint takes for ever after its first file: ``... RECIPE FLAG``."""

import sys
import time
from pathlib import Path
from typing import Any

import megatron_irl.run.loop  # noqa: F401
from megatron_irl.cli import main
from megatron_irl.storage import saving

original, calls = saving.write_buckets, []


def write(buckets: Any, folder: Path, **options: Any) -> Any:
    calls.append(folder)
    if len(calls) == 2:
        (folder / "__0_0.distcp").write_bytes(b"half")
        Path(sys.argv[2]).touch()
        time.sleep(600)
    return original(buckets, folder, **options)


if __name__ == "__main__":
    saving.write_buckets = write
    sys.exit(main(["train", sys.argv[1]]))
