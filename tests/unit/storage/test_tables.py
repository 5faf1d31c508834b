"""JSON lines as Parquet: every value of a column reads back the same way."""

import json

import pyarrow.parquet as pq
import pytest

from megatron_irl.storage import tables


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_a_column_without_one_type_is_json_throughout(tmp_path, monkeypatch, rows):
    """Also where a batch of lines has strings only; a column of strings is never JSON."""
    monkeypatch.setattr(tables, "ROWS", rows)
    mixed = ["a", "b", 3, None, [1, "x"], "c"]
    texts = ["a", "b", "c", None, "\ud800", "d"]
    lines, path = tmp_path / "lines.jsonl", tmp_path / "out.parquet"
    lines.write_text("".join(
        json.dumps({"mixed": m, "text": t, "number": i}) + "\n"
        for i, (m, t) in enumerate(zip(mixed, texts, strict=True))))
    tables.write_parquet_of_lines(lines, path)
    found = pq.read_table(path).to_pydict()
    assert [v if v is None else json.loads(v) for v in found["mixed"]] == mixed
    assert found["text"] == ["a", "b", "c", None, "?", "d"]
    assert found["number"] == list(range(6))
