"""The safetensors of an HF folder: headers, slices, and what can be wrong with them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.peft_folder import AdaptedSlice, PeftFolder, is_adapter
from megatron_irl.errors import UserError
from megatron_irl.families.linears import targeted_layers
from megatron_irl.families.table import BUFFERS, HfTensor, hf_head, rows

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class HfWeights:
    """Read-only view of a folder's tensors; files are opened once, tensors read by slice.

    A folder of peft's is that of its base, with the adapter's updates added to what is read.

    Attributes:
        files: Tensor name → file name.

    Raises:
        UserError: No safetensors, a missing or damaged shard, an index that names what is not
            there; the message names the file and tensor.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = Path(hf_dir)
        self.adapter: PeftFolder | None = None
        self._adapted: set[str] = set()
        if is_adapter(self.hf_dir):
            self.adapter = PeftFolder.read(self.hf_dir)
            self._adapted = self.adapter.modules()
            self.hf_dir = self.adapter.base_folder()
        self._open: dict[str, Any] = {}
        self._names: dict[str, set[str]] = {}
        self.files = self._locate()

    def slice(self, name: str) -> Any:
        """A lazily read tensor: index it to read only those bytes."""
        whole = self._file(self.files[name]).get_slice(name)
        module = name.removesuffix(".weight")
        if self.adapter is None or module not in self._adapted:
            return whole
        return AdaptedSlice(whole, *self.adapter.tensors(module), self.adapter.scale)

    def close(self) -> None:
        """Unmap the files; the next read opens them again.

        Pages of a mapped file count as this process's memory for as long as it is mapped.
        """
        self._open.clear()

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.hf_dir / self.files[name]

    def check(self, tensors: Iterable[HfTensor], arch: Architecture) -> None:
        """Raise UserError unless the tensors are there with their shapes, as floats."""
        for tensor in tensors:
            if tensor.name not in self.files:
                raise UserError(f"{self.hf_dir} lacks {tensor.name}, which config.json implies.")
            header = self.slice(tensor.name)
            shape, expected = list(header.get_shape()), list(tensor.shape(arch))
            if shape != expected:
                raise UserError(
                    f"{self.where(tensor.name)}: {tensor.name} has shape {shape}, config.json "
                    f"implies {expected}."
                )
            if header.get_dtype() not in FLOATS:
                raise UserError(
                    f"{self.where(tensor.name)}: {tensor.name} has dtype {header.get_dtype()}; "
                    f"{', '.join(FLOATS)} can be read. Dequantize the model first."
                )

    def _locate(self) -> dict[str, str]:
        """Find every tensor, checking an index against the files' own headers.

        A single file wins over an index, as it does in transformers.
        """
        if (self.hf_dir / SINGLE).exists():
            return dict.fromkeys(self._names_in(SINGLE), SINGLE)
        path = self.hf_dir / INDEX
        if not path.exists():
            raise UserError(f"{self.hf_dir} has neither {SINGLE} nor {INDEX}. {self._advice()}")
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = set(listed.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a safetensors index: {error!r}") from error
        for name, file in listed.items():
            if not isinstance(file, str) or not (self.hf_dir / file).is_file():
                raise UserError(f"{path} places {name} in {file}, which does not exist.")
            if name not in self._names_in(file):
                raise UserError(f"{path} places {name} in {file}, which does not hold it.")
        unlisted = {n: f for f in sorted(files) for n in self._names_in(f) if n not in listed}
        return listed | unlisted

    def _advice(self) -> str:
        pickled = (".bin", ".pth", ".pt")
        others = sorted(p.name for p in self.hf_dir.glob("*") if p.suffix in pickled)
        if not others:
            return "Download or copy the weights into it."
        return (
            f"{others[0]} holds pickled weights, which are not read. Convert the folder: load it "
            "with transformers and save it with save_pretrained, which writes safetensors."
        )

    def _names_in(self, file: str) -> set[str]:
        if file not in self._names:
            self._names[file] = set(self._file(file).keys())
        return self._names[file]

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.hf_dir / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            except SafetensorError as error:
                raise UserError(f"{path} is damaged: {_damage(path, error)}") from error
        return self._open[file]


def validate_hf_folder(hf_dir: Path, arch: Architecture) -> None:
    """Compare a folder with its architecture, from the headers only.

    Raises:
        UserError: Missing or surplus tensors, wrong shapes or dtypes, damaged files, by tensor
            and file.
    """
    weights = HfWeights(hf_dir)
    if weights.adapter is not None:
        adapter = weights.adapter
        adapter.check(arch, targeted_layers(arch, adapter.targets, adapter.folder))
    expected = [tensor for row in rows(arch) for tensor in row.hf]
    missing = sorted({t.name for t in expected} - set(weights.files))
    if missing:
        raise UserError(
            f"{hf_dir} lacks {_some(missing)}, which config.json implies (looked in "
            f"{', '.join(sorted(set(weights.files.values()))[:3])})."
        )
    surplus = sorted(set(weights.files) - {t.name for t in expected})
    surplus = [name for name in surplus if not _redundant(name, arch)]
    if surplus:
        raise UserError(
            f"{weights.where(surplus[0])} holds {_some(surplus)}, which config.json does not "
            "imply; it is not this architecture."
        )
    weights.check(expected, arch)


def _redundant(name: str, arch: Architecture) -> bool:
    tied_head = arch.tie_word_embeddings and name == hf_head(arch)
    return tied_head or name.endswith(BUFFERS)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _damage(path: Path, error: Exception) -> str:
    """Say what is wrong with a file that safetensors refuses: usually half a download."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head == b"version ":
            return "it is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
        size = int.from_bytes(head, "little")
        try:
            header = json.loads(file.read(size)) if size < path.stat().st_size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        return f"its header cannot be read ({error}). Copy it again."
    held = path.stat().st_size - 8 - size
    entries = {n: e for n, e in header.items() if isinstance(e, dict) and "data_offsets" in e}
    lost = sorted(n for n, entry in entries.items() if max(entry["data_offsets"]) > held)
    if not lost:
        return f"{error}. Copy it again."
    return f"it ends before {_some(lost)} ({error}). Copy it again."
