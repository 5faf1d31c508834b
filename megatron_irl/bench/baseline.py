"""Recorded speeds of a machine, and what has fallen since."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.errors import UserError

FALL = 0.10


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """The results of a baseline file.

    Raises:
        UserError: It is missing or not one.
    """
    try:
        return list(json.loads(path.read_text())["results"])
    except FileNotFoundError:
        raise UserError(f"--baseline {path} does not exist. Give a file such as "
                        "benchmarks/h100.json.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--baseline {path} is no baseline: {error!r}. It is JSON with a list "
                        "called results.") from None


def falls(
    results: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A sentence for each result over ten percent slower than the baseline's of its case.

    Of several results of one case, which a sweep of what a case does not name has, nothing is said.
    """
    known = {entry["case"]: entry for entry in baseline
             if "case" in entry and "tokens_per_second" in entry}
    times = Counter(result.get("case") for result in results)
    said = []
    for result in results:
        before = known.get(result.get("case", ""))
        if before is None or "tokens_per_second" not in result or times[result["case"]] > 1:
            continue
        was, now = before["tokens_per_second"], result["tokens_per_second"]
        if now < (1 - FALL) * was:
            said.append(f"{result['case']}: {now:,.0f} tokens/s, {1 - now / was:.0%} below the "
                        f"{was:,.0f} of {before.get('date', 'the baseline')}")
    return said
