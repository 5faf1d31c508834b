"""A study as one page: hypothesis, picture, table, and what the methods answer."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_irl.storage.commit import write_file
from studies.report import short_rows

STYLE = """body { font: 15px/1.5 system-ui, sans-serif;
max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: 3px 10px; text-align: left;
border-bottom: 1px solid #ccc; } img { max-width: 100%; } code { background: #eee; }"""


def write_page(
    results: Mapping[str, Any], samples: Sequence[tuple[str, Mapping[str, str]]], out: Path
) -> Path:
    """Write ``report.html``, which needs no other file.

    Args:
        samples: A prompt and the greedy answer of each method.
        out: Folder with ``results.png``.
    """
    picture = base64.b64encode((out / "results.png").read_bytes()).decode()
    names = list(samples[0][1]) if samples else []
    said = [["prompt", *names]] + [[word, *(texts[n] for n in names)] for word, texts in samples]
    page = out / "report.html"
    write_file(page, "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(results['name'])}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(results['name'])}</h1><p>{html.escape(results['hypothesis'])}</p>",
        f'<img alt="share of right answers by method" src="data:image/png;base64,{picture}">',
        _table(short_rows(results)), "<h2>Greedy answers</h2>", _table(said), "</html>",
    ]).encode())
    return page


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                   for tag, part in (("th", rows[:1]), ("td", rows[1:])) for row in part]
    return "<table>" + head + "".join(body) + "</table>"
