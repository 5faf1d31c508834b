"""Data files by their suffixes: which kind one is, and its bytes without the compression."""

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed as its suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":  # Arrow brings the codec, so no library of its own is needed
        stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 16))
    return open(path, "rb")
