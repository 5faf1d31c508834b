"""Records of a file of JSON lines, as the commands write them."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All of them."""
    return [json.loads(line) for line in path.read_text().splitlines()]
