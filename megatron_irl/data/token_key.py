"""A name for everything that decides which token ids a recipe's files become."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_irl import __version__
from megatron_irl.config import DataSource, Recipe
from megatron_irl.data.tokenizer import Tokenizer

LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "jinja2", "pyarrow")
TOKENIZER_FILES = {".json", ".model", ".jinja", ".txt", ".tiktoken"}
BLOCK_BYTES = 1 << 22


def token_key(
    recipe: Recipe, tokenizer: Tokenizer, preferences: Sequence[str | DataSource] = ()
) -> str:
    """Thirty-two hex digits that change whenever the ids might: one for each way to read.

    In it are the bytes of every data file, so that a file that was written again with the same
    length in the same second is another one; those of the tokenizer's files; the template with its
    arguments and date; ``data`` of the recipe, limits and turns included; the rows of the model's
    embedding where the tokenizer has more ids; and the versions of this package, of its code that
    makes ids, and of the libraries it uses. The date counts where the template prints it. Files are
    hashed on several cores, at about 1 GB a second each.

    Args:
        preferences: Those that are trained on.
    """
    data = recipe.data
    sources = [*data.train, *data.eval, *preferences, *data.eval_preferences]
    template = tokenizer.template
    written = None if template is None else [
        template.text, dict(template.arguments),
        template.date.isoformat() if template.prints_date else None]
    said = {
        "data": asdict(data),
        "preferences": [asdict(s) if isinstance(s, DataSource) else s for s in preferences],
        "template": written,
        "stop_ids": tokenizer.stop_ids,
        "embedding_rows": tokenizer.embedding_rows,  # a text with ids beyond them is refused
        "versions": [__version__, *map(_version, LIBRARIES)],
        "code": _digests(sorted(Path(__file__).parent.glob("*.py"))),
        "tokenizer": _digests(_tokenizer_files(Path(data.tokenizer or recipe.model.hf))),
        "files": [_digests(sorted(_files(source))) for source in sources],
    }
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _files(source: str | DataSource) -> Iterator[Path]:
    for name in source.path if isinstance(source, DataSource) else (source,):
        path = Path(name)
        # What is not there is an error when it is read, which says more about it.
        yield from (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (
            [path] if path.is_file() else [])


def _tokenizer_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.glob("*") if p.suffix in TOKENIZER_FILES and p.is_file()
                  and not p.name.endswith(".index.json"))


def _digests(paths: Sequence[Path]) -> list[list[str]]:
    """Name and content of files; hashing leaves other threads to run."""
    with ThreadPoolExecutor() as pool:
        return [[path.name, digest] for path, digest in
                zip(paths, pool.map(_content, paths), strict=True)]


def _content(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        # Whoever reads it next says so in the user's words; no corpus is kept of such a file.
        return f"{error}"
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
