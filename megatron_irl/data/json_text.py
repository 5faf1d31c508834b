"""JSON that is not one object a line: arrays, and values printed over several lines."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_irl.errors import UserError

_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def parsed_line(line: str) -> Any:
    """``json.loads`` of a line, without what that does again for every call.

    Raises:
        json.JSONDecodeError: It is not JSON.
    """
    try:
        value, end = _DECODER.raw_decode(line)
    except json.JSONDecodeError:  # of white space in front too
        return json.loads(line)
    return json.loads(line) if line[end:].strip(" \t\r\n") else value


def is_array(head: bytes) -> bool:
    """Whether a text that begins so is an array of objects."""
    return re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", head) is not None


def is_stream(head: bytes) -> bool:
    """Whether the first value ends elsewhere than its line does, and another one or none follows.

    So are pretty-printed objects, and lines that end in a lone carriage return.
    """
    text = head.removeprefix(_BOM).decode("utf-8", "replace").lstrip()
    if not text.startswith("{") or _is_json(text.partition("\n")[0]):
        return False
    try:
        _, end = _DECODER.raw_decode(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return text[end:].lstrip()[:1] in ("", "{")


def array_items(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (``file:line``, item) of an array; the line is the one that the item begins on."""
    text = content.removeprefix(_BOM).decode("utf-8")
    start = text.index("[") + 1
    place = _Lines(path, text)
    while True:
        start = _skip(text, start)
        if text[start : start + 1] == "]":
            break
        item, end = _value(place, start)
        yield place.source(start), item
        start = _skip(text, end)
        mark = text[start : start + 1]
        if mark not in (",", "]"):
            raise UserError(f"{place.source(start)}: not JSON: a comma or ] must follow the item")
        if mark == ",":
            start += 1
    if _skip(text, start + 1) < len(text):
        raise UserError(f"{place.source(start)}: not JSON: text after the array's end")


def stream_values(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (``file:line``, value) of values with nothing but white space between them."""
    text = content.removeprefix(_BOM).decode("utf-8")
    place = _Lines(path, text)
    start = _skip(text, 0)
    while start < len(text):
        value, end = _value(place, start)
        yield place.source(start), value
        start = _skip(text, end)


class _Lines:
    """Line numbers of places in a text, asked for in ascending order."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self._place, self._line = 0, 1
        self._break = "\n" if "\n" in text else "\r"

    def source(self, place: int) -> str:
        self._line += self.text.count(self._break, self._place, place)
        self._place = place
        return f"{self.path}:{self._line}"


def _value(place: _Lines, start: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(place.text, start)
    except json.JSONDecodeError as error:  # where the next value begins is not known either
        raise UserError(f"{place.source(max(start, error.pos))}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{place.source(start)}: not JSON: nested too deeply") from None


def _skip(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None  # it matches nothing too
    return found.end()


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True
