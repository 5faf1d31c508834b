"""The ``.metadata`` of a distributed checkpoint, read without running what a stranger put there.

It is a pickle, and a pickle may call anything. Only the classes that torch and Megatron write into
it are made; they hold numbers, names and each other.
"""

import collections
import dataclasses
import enum
import importlib
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_irl.compat import safe_bytes
from megatron_irl.errors import UserError

METADATA = ".metadata"
# Of these modules their own dataclasses and enumerations, nothing that they import.
_RECORD_MODULES = (
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_NAMED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


def read_metadata(checkpoint: Path) -> Metadata:
    """Read ``.metadata`` of a checkpoint folder, before anything else of it.

    From then on this process reads the objects in a checkpoint's files as safely as weights.

    Raises:
        UserError: It is missing or damaged, or holds what no checkpoint has.
    """
    safe_bytes.install()
    try:
        with open(checkpoint / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can stumble over anything
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {METADATA} is missing or damaged "
            f"({error})."
        ) from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"the checkpoint {checkpoint} cannot be read: {METADATA} holds a "
                        f"{type(metadata).__name__}.")
    return metadata


class _Unpickler(pickle.Unpickler):
    """Refuses every name but the records of a checkpoint."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._where = Path(file.name).parent

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _NAMED:
            return _NAMED[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name == "pathlib" and global_name in ("PosixPath", "PurePosixPath"):
            return Path
        if module_name in _RECORD_MODULES and _is_record(module_name, global_name):
            return _attribute(module_name, global_name)
        raise UserError(
            f"the checkpoint {self._where} is refused: its {METADATA} asks for "
            f"{module_name}.{global_name}, which no checkpoint needs and which could run any code. "
            "Take the checkpoint from somebody you trust."
        )


def _attribute(module_name: str, dotted: str) -> Any:
    found: Any = importlib.import_module(module_name)
    for name in dotted.split("."):  # TensorProperties' encoding of layouts is a nested class
        found = getattr(found, name, None)
    return found


def _is_record(module_name: str, name: str) -> bool:
    found = _attribute(module_name, name)
    own = isinstance(found, type) and found.__module__ == module_name
    return own and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
