"""Paths in a recipe: the home folder, file patterns, folders of data sets, splits."""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_irl.algorithms.registry import rules_of
from megatron_irl.config.bounds import value_at
from megatron_irl.config.hub_cache import hub_snapshot
from megatron_irl.config.schema import DataSource, Recipe
from megatron_irl.errors import UserError

# Kinds of files taken from a folder of data, each also compressed.
KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_SPLIT = re.compile(r"^(train|test|valid|validation|val|dev|eval)(?=$|[^a-z])", re.IGNORECASE)
_SHARD = re.compile(r"^(.+?)-\d{5}-of-\d{5}$")

Sources = tuple[str | DataSource, ...]


def expand_home(recipe: Recipe) -> Recipe:
    """Return the recipe with ``~`` of every path spelled out."""
    home = os.path.expanduser
    data = dataclasses.replace(
        recipe.data,
        tokenizer=recipe.data.tokenizer and home(recipe.data.tokenizer),
        chat_template=recipe.data.chat_template and home(recipe.data.chat_template),
        **{name: _with_home(getattr(recipe.data, name))
           for name in ("train", "eval", "eval_preferences")})
    recipe = _with_preferences(recipe, lambda _, sources: _with_home(sources))
    model = dataclasses.replace(recipe.model, hf=home(recipe.model.hf))
    path = recipe.adapter.path
    adapter = dataclasses.replace(recipe.adapter, path=path and home(path))
    return dataclasses.replace(recipe, data=data, model=model, adapter=adapter,
                               output_dir=home(recipe.output_dir))


def expand_files(recipe: Recipe) -> Recipe:
    """Return the recipe with the files that its patterns and folders stand for.

    Raises:
        UserError: A pattern matches nothing, a file is named twice, or which split is meant is
            not clear.
    """
    data = dataclasses.replace(recipe.data, **{
        name: _expand(f"data.{name}", getattr(recipe.data, name))
        for name in ("train", "eval", "eval_preferences")})
    return dataclasses.replace(_with_preferences(recipe, _expand), data=data)


def _with_preferences(recipe: Recipe, change: Callable[[str, Sources], Sources]) -> Recipe:
    """The recipe with the preferences that its algorithm trains on changed, if it has any."""
    trained_on = rules_of(recipe.algorithm.name).preferences
    if trained_on is None:
        return recipe
    name, _, key = trained_on.partition(".")
    files = change(trained_on, value_at(recipe, trained_on))
    section = dataclasses.replace(recipe.sections[name], **{key: files})
    return dataclasses.replace(recipe, sections={**recipe.sections, name: section})


def paths_of(sources: Iterable[str | DataSource]) -> list[str]:
    """The paths of sources, in order."""
    return [path for each in sources
            for path in ([each] if isinstance(each, str) else each.path)]


def _with_home(sources: Sources) -> Sources:
    return tuple(
        os.path.expanduser(each) if isinstance(each, str)
        else dataclasses.replace(each, path=tuple(map(os.path.expanduser, each.path)))
        for each in sources)


def _expand(key: str, sources: Sources) -> Sources:
    expanded: list[str | DataSource] = []
    for each in sources:
        if isinstance(each, str):
            expanded += files_of(key, each, None)
        else:
            found = [file for pattern in each.path for file in files_of(key, pattern, each.split)]
            # The split is in the names now; written again it would be looked for in folders.
            saved = all(os.path.isdir(file) for file in found)
            split = each.split if saved else None
            expanded.append(dataclasses.replace(each, path=tuple(found), split=split))
    paths = [os.path.normpath(path) for path in paths_of(expanded)]
    repeated = sorted({path for path in paths if paths.count(path) > 1}) if (
        len(set(paths)) < len(paths)) else []
    if repeated:
        raise UserError(f"{key} names {repeated[0]} twice; its records would count twice. "
                        "List every file once; a weight takes its records more often, as in "
                        f"{{path: {repeated[0]}, weight: 2}}.")
    return tuple(expanded)


def files_of(key: str, pattern: str, split: str | None = None) -> list[str]:
    """Return the files of a path, folder or glob, sorted.

    A name that exists is taken literally, whatever characters it has. A folder that
    ``datasets.save_to_disk`` wrote stands for itself.

    Args:
        key: What the user set, for messages.
        pattern: The path; a relative one counts from the working directory.
        split: Which split of a folder with several.

    Raises:
        UserError: There is no such file, or which split is meant is not clear.
    """
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        return _of_folder(key, hub_snapshot(pattern), split)
    found = sorted(glob.glob(pattern, recursive=True))
    files = [file for name in found for file in
             ([name] if os.path.isfile(name) else
              _of_folder(key, Path(name), split) if _is_saved(Path(name)) else [])]
    if not files:
        raise UserError(f"{key}={pattern} matches no file; the working directory is "
                        f"{os.getcwd()}. Set {key} to files of data, such as JSONL or Parquet.")
    return files


def _of_folder(key: str, folder: Path, split: str | None) -> list[str]:
    """The data files in a folder, of one split where their names tell several."""
    if _is_saved(folder):
        if not (folder / "dataset_dict.json").is_file():
            return [str(folder)]
        names = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
        return [str(folder / _chosen(key, folder, names, split))]
    files = sorted(p for p in folder.rglob("*") if _is_data(p, folder))
    if not files:
        raise UserError(f"{key}={folder} is a folder without data files; the working directory is "
                        f"{os.getcwd()}. Set {key} to JSONL or Parquet files.")
    names = sorted({name for name in map(_split_of, files) if name})
    if not names and split is None:
        return list(map(str, files))
    chosen = _chosen(key, folder, names, split)
    return [str(file) for file in files if _split_of(file) == chosen]


def _chosen(key: str, folder: Path, names: Sequence[str], split: str | None) -> str:
    """The split that is meant: the one asked for, the only one, or for training ``train``."""
    if split is None and len(names) == 1:
        return names[0]
    wanted = split or ("train" if key == "data.train" else "")
    if wanted in names:
        return wanted
    asked = f"no split {split}; it has" if split else "several splits:"
    example = split if split in names else next(iter(names), "NAME")
    raise UserError(f"{key}={folder} has {asked} {', '.join(names) or 'none'}. Name one, as in "
                    f"{key}={{path: {folder}, split: {example}}}.")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _is_data(path: Path, folder: Path) -> bool:
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return name.endswith(KINDS) and name not in _NOT_DATA and not hidden and path.is_file()


def _split_of(path: Path) -> str | None:
    """``train`` of ``train-00000-of-00002.parquet``, ``train.jsonl`` or ``train/part.jsonl``."""
    stem = path.name.partition(".")[0]
    shard = _SHARD.match(stem)
    if shard:
        return shard[1]
    return next((name for name in (stem, path.parent.name) if _SPLIT.match(name)), None)
