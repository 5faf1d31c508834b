"""``python -m megatron_irl``."""

import sys

from megatron_irl.cli import main

if __name__ == "__main__":
    sys.exit(main())
