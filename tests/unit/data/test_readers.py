"""Files of every kind give the same records, each with its place; broken ones are named."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_irl.data import readers
from megatron_irl.data.readers import as_object, delimiter_of, read_rows
from megatron_irl.data.records import collect
from megatron_irl.data.sources import Reading
from megatron_irl.errors import UserError

RECORDS = [{"prompt": "a é\n", "response": "c"}, {"prompt": "b", "response": "d, \"e\""}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TABLE = pa.Table.from_pylist(RECORDS)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def rows(path):
    return [(source, as_object(raw)) for source, raw in read_rows(path)]


TEXTS = {
    "lines.jsonl": LINES, "lines.JSONL": LINES, "lines.ndjson": LINES, "lines.json": LINES,
    "array.json": json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "pretty.jsonl": "\n".join(json.dumps(r, indent=2) for r in RECORDS).encode(),
    "returns.jsonl": LINES.replace(b"\n", b"\r"),
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n" + LINES.replace(b"\n", b"\n \n\n"),
    "a.jsonl.gz": gzip.compress(LINES), "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "two.jsonl.gz": gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]),
    "a.jsonl.zst": zstd(LINES), "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.csv": b'prompt,response\n"a \xc3\xa9\n",c\nb,"d, ""e"""\n',
    "a.tsv": b'\xef\xbb\xbfprompt\tresponse\n"a \xc3\xa9\n"\tc\nb\t"d, ""e"""\n',
    "semicolons.csv": b'\xef\xbb\xbf"prompt";response\n"a \xc3\xa9\n";c\nb;"d, ""e"""\n',
    "tabs.csv": b'prompt\tresponse\r"a \xc3\xa9\n"\tc\rb\t"d, ""e"""\r',
    "semicolons.csv.gz": gzip.compress(b'prompt;response\n"a \xc3\xa9\n";c\nb;"d, ""e"""\n'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_files(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert [record for _, record in rows(tmp_path / name)] == RECORDS


def test_a_long_zstd_file_streams(tmp_path):
    lines = [{"prompt": f"{i} " * 50, "response": str(i)} for i in range(20_000)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(content))
    assert [record for _, record in rows(tmp_path / "a.jsonl.zst")] == lines


def test_places_are_lines(tmp_path):
    (tmp_path / "pretty.json").write_text(json.dumps(RECORDS, indent=2))
    (tmp_path / "blank.jsonl").write_bytes(TEXTS["blank.jsonl"])
    assert [source.rpartition(":")[2] for source, _ in rows(tmp_path / "pretty.json")] == ["2", "6"]
    assert [source.rpartition(":")[2] for source, _ in rows(tmp_path / "blank.jsonl")] == ["2", "5"]


def test_column_files(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(
            sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(
            sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "file.arrow", "stream.arrow", "saved"):
        path = tmp_path / name
        assert rows(path) == [(f"{path}:row {i}", r) for i, r in enumerate(RECORDS, start=1)]


def test_a_saved_selection_of_a_data_set(tmp_path):
    """What was filtered or shuffled in memory is saved as it was seen."""
    many = datasets.Dataset.from_list([{"prompt": str(i), "response": "x"} for i in range(2500)])
    many.select(range(2400, 100, -1)).save_to_disk(tmp_path / "saved", num_shards=3)
    found = [record["prompt"] for _, record in rows(tmp_path / "saved")]
    assert found == [str(i) for i in range(2400, 100, -1)]


def test_columns_of_any_string_type(tmp_path):
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(["a", "b"], pa.string()).cast(kind)
        pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
        assert [r["prompt"] for _, r in rows(tmp_path / "a.parquet")] == ["a", "b"]


def test_nulls_inside_messages_are_left_out_and_fields_stay(tmp_path):
    frame = pandas.DataFrame({"messages": [[{"role": "user", "content": "a", "name": None},
                                            {"role": "tool", "content": "b", "name": "f"}]],
                              "answer": [None]})
    frame.to_parquet(tmp_path / "a.parquet")
    ((_, record),) = rows(tmp_path / "a.parquet")
    assert record == {"messages": [{"role": "user", "content": "a"},
                                   {"role": "tool", "content": "b", "name": "f"}], "answer": None}


BROKEN = [
    ("a.jsonl", "ÿþ".encode("latin1") + "{}".encode("utf-16-le"), "is UTF-16, JSON is UTF-8"),
    ("a.jsonl", b'{"prompt": "caf\xe9"}\n', ":1: not UTF-8"),
    ("a.jsonl", b'{"a": 1},\n{"a": 1}\n', ":1: a comma follows the record"),
    ("a.jsonl", b'{"a": 1}\n["b"]\n', ":2: must be a JSON object, not a list"),
    ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2: not JSON: a comma or ] must follow"),
    ("a.json", b'[{"a": 1},\n\n {"a": }]', ":3: not JSON: Expecting value"),
    ("a.json", b'[{"a": 1}] more', "text after the array's end"),
    ("a.json", b'[{"a": 1}, "b"]', ":1: must be a JSON object, not a string"),
    ("a.json", b'{\n "a": 1\n}\n{\n "a": \n}', ":6: not JSON: Expecting value"),
    ("a.jsonl", b'{"a": ' + b"[" * 100_000, ":1: not JSON"),
    ("a.csv", b"prompt,response\na,b,c\n", ":row 1: the row has more cells than"),
    ("a.csv", b"prompt,response\n\xff,b\n", "is not UTF-8 (byte 0xff). It may be Latin-1"),
    ("a.csv", b"\xff\xfe" + "prompt,a".encode("utf-16-le"), "is UTF-16, not UTF-8. Convert it"),
    ("a.json", b'[{"prompt": "caf\xe9"}]', "iconv -f WINDOWS-1252 -t UTF-8"),
    ("a.jsonl.zst", b"not zstd at all", "cannot be read"),
    ("a.jsonl.xz", b"not xz at all", "cannot be read"),
    ("a.arrow", b"ARROW1 cut", "cannot be read"),
    ("a.arrow", b"", "cannot be read"),
    ("a.parquet.gz", b"", "a compressed .parquet file. Unpack it"),
    ("a.xlsx", b"", "unknown kind of file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        for source, raw in read_rows(path):
            try:
                as_object(raw)
            except UserError as error:
                raise UserError(f"{source}: {error}") from error
    assert str(raised.value).startswith(str(path)) and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cells_that_are_empty_are_not_there(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,answer\na,b,\n")
    assert rows(tmp_path / "a.csv")[0][1] == {"prompt": "a", "response": "b", "answer": None}


@pytest.mark.parametrize(("header", "delimiter"), [
    ("prompt,response", ","), ("prompt,a;b", ","), ("a;b;c,d", ","), ("text", ","), ("", ","),
    ('"a,b";"c"', ";"), ('"a;b"', ","), ("a;b\tc\td", "\t"), ("a\tb", "\t")])
def test_the_header_says_what_separates_cells(tmp_path, header, delimiter):
    (tmp_path / "a.csv").write_text(header + "\n1;2,3\n")
    assert delimiter_of(tmp_path / "a.csv") == delimiter


def test_a_table_is_opened_once_and_its_limit_is_its_own(tmp_path, monkeypatch):
    """Cells may be of any length; what the process has set for csv stands, also between rows."""
    answer = "b" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,response\na,{answer}\nc,{answer}\n")
    opened = []
    original = readers.open_binary
    monkeypatch.setattr(readers, "open_binary", lambda path: opened.append(path) or original(path))
    before = csv.field_size_limit(1000)
    try:
        for _, row in read_rows(tmp_path / "a.csv"):
            assert row["response"] == answer and csv.field_size_limit() == 1000
        assert delimiter_of(tmp_path / "a.csv") == "," and csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)
    assert len(opened) == 2  # delimiter_of's too


def test_what_was_taken_for_a_table_is_said_and_an_encoding_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question;answer\n1,5 + 1?;2,5\n")
    reading = Reading.of(str(path))
    ((found, record),) = collect(reading, lambda found, record: (found[0], record))
    assert record == {"question": "1,5 + 1?", "answer": "2,5"}
    assert reading.notes[0].startswith(f"{path}: cells separated by semicolons, 1 records as ")
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"prompt": "caf\xe9", "response": "b"}\n' * 3)
    with pytest.raises(UserError) as raised:
        collect(str(lines), lambda found, record: record)
    assert str(raised.value).count("not UTF-8: ") == 3
    assert str(raised.value).count("It may be Latin-1 or Windows-1252. Convert it, as in ") == 1
