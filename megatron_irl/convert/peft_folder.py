"""An adapter on disk in peft's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

peft itself is not needed for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_irl.convert.weights_digest import weights_digest
from megatron_irl.errors import UserError
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.linears import TargetedLayer, module_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # beside them: the digest of the base, which peft has no place for
_PREFIX = "base_model.model."
# Options of peft under which an adapter is something else than alpha / r * B A on linear layers.
_REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
            "layers_pattern", "fan_in_fan_out", "lora_bias", "exclude_modules",
            "trainable_token_indices", "megatron_config", "layer_replication", "use_qalora",
            "alora_invocation_tokens", "arrow_config")


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that peft or a run wrote.

    Attributes:
        rank, alpha, targets: What it says; ``alpha`` such that the scale is alpha / rank.
        base: The folder of its base, as it says.
        digest: The digest of its base; None where the writer named none.
    """

    folder: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None = None
    digest: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "PeftFolder":
        """Read the configuration.

        Raises:
            UserError: It is missing or damaged, or not a LoRA of this kind.
        """
        path = folder / CONFIG
        values = _json(path)
        if values.get("peft_type") != "LORA":
            raise UserError(f"{path}: peft_type={values.get('peft_type')} is not supported (LORA "
                            "is).")
        # First, as peft writes rank and alpha patterns beside it.
        if parameters := values.get("target_parameters"):
            raise UserError(
                f"{path}: target_parameters={parameters} is not supported; the router and the "
                "experts of a mixture take no adapter (peft's all-linear gives them one). Train "
                "one with target_modules by name: q_proj, k_proj, v_proj, o_proj."
            )
        for key in _REFUSED:
            if values.get(key):
                raise UserError(f"{path}: {key}={values[key]} is not supported.")
        if values.get("bias", "none") != "none":
            raise UserError(f"{path}: bias={values['bias']} is not supported (none is).")
        rank, alpha, targets = (values.get(k) for k in ("r", "lora_alpha", "target_modules"))
        if isinstance(targets, str):
            targets = [targets]
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)
                and isinstance(targets, list) and targets):
            raise UserError(f"{path} has no r, lora_alpha or target_modules that can be read. Save "
                            "the adapter again.")
        if values.get("use_rslora"):  # alpha / sqrt(r) there
            alpha = alpha * rank**0.5
        digest = _json(folder / BASE).get("digest") if (folder / BASE).is_file() else None
        return cls(folder, rank, float(alpha), tuple(sorted(map(str, targets))),
                   values.get("base_model_name_or_path"), digest)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def base_folder(self) -> Path:
        """The model below it.

        Raises:
            UserError: It is not where the adapter says, or is another model.
        """
        path = self.folder / CONFIG
        base = Path(self.base or "")
        if self.base is None or not (base / "config.json").is_file():
            raise UserError(
                f"{path}: base_model_name_or_path={self.base} is not a model folder on this "
                f"machine (the working directory is {Path.cwd()}). Set it there to the folder of "
                "the model that the adapter was made for."
            )
        if self.digest is not None:
            self.check_base(weights_digest(base), base)
        return base

    def modules(self) -> set[str]:
        """HF's names of the modules it has matrices for."""
        with self._open() as file:
            names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
        return {n.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for n in names}

    def tensors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a module, by its HF name, as stored."""
        with self._open() as file:
            return tuple(file.get_tensor(name) for name in _names(module))  # type: ignore[return-value]

    def check(self, arch: Architecture, layers: Sequence[TargetedLayer]) -> None:
        """Raise UserError unless it has exactly these layers' matrices, in their shapes."""
        expected = {}
        for layer in layers:
            for part in layer.parts:
                tensor = layer.row.hf[part]
                out, into = tensor.shape(arch)
                a, b = _names(module_name(tensor))
                expected |= {a: [self.rank, into], b: [out, self.rank]}
        path = self.folder / WEIGHTS
        with self._open() as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, shape in expected.items():
            if found.get(name) != shape:
                have = f"has shape {found[name]}" if name in found else "is missing"
                raise UserError(
                    f"{path}: {name} {have}, model.hf implies {shape}; it is an adapter of another "
                    "model. Give the model that it was made for as model.hf."
                )
        # With an adapter on the head peft also writes the head itself.
        surplus = sorted(n for n in set(found) - set(expected) if ".base_layer." not in n)
        if surplus:
            raise UserError(f"{path} holds {surplus[0]}, which is no adapter of a linear layer of "
                            "model.hf. Give the model that it was made for as model.hf.")

    def check_base(self, digest: str, hf_dir: Path) -> None:
        """Raise UserError if it names another base than the model of this digest."""
        if self.digest is not None and self.digest != digest:
            raise UserError(
                f"{self.folder} is an adapter of another base: the digest of {hf_dir} is {digest}, "
                f"and {self.digest} in its {BASE}. Give the model that it was made for"
                f"{f' ({self.base})' if self.base else ''}."
            )

    def _open(self) -> Any:
        path = self.folder / WEIGHTS
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}. Copy it again.") from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model beside it."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def model_folder(folder: Path) -> Path:
    """Where config and tokenizer of a model are: of an adapter, in the folder of its base.

    Raises:
        UserError: As ``PeftFolder.read`` and ``base_folder``.
    """
    return PeftFolder.read(folder).base_folder() if is_adapter(folder) else folder


class AdaptedSlice:
    """A weight of the base with the adapter's update, computed for what is asked of it."""

    def __init__(self, base: Any, a: Tensor, b: Tensor, scale: float) -> None:
        self._base, self._a, self._b, self._scale = base, a, b, scale

    def get_shape(self) -> list[int]:
        return self._base.get_shape()

    def get_dtype(self) -> str:
        return self._base.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        base = self._base[index]
        update = (self._b[rows].float() @ self._a[:, columns].float()).mul_(self._scale)
        return (base.float() + update).to(base.dtype)


def tensor_names(module: str) -> tuple[str, str]:
    """Peft's names of A and B of a module."""
    return _names(module)


def write_config(
    folder: Path, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], base: Path,
    digest: str,
) -> None:
    """Write what peft reads beside the matrices, and the digest of the base."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None,
        "base_model_name_or_path": str(base), "revision": None, "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout, "target_modules": sorted(targets), "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "modules_to_save": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {"base": str(base), "digest": digest}
    (folder / BASE).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def require_finite(name: str, tensor: Tensor, folder: Path) -> Tensor:
    """The tensor, or UserError."""
    if not torch.isfinite(tensor).all():
        raise UserError(f"{folder / WEIGHTS}: {name} holds NaN or infinity. Take another copy.")
    return tensor


def _names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Give a folder that peft wrote, with "
                        f"{CONFIG} and {WEIGHTS}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object. Give a folder that peft wrote.")
    return values
