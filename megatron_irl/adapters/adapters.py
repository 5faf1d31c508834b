"""All adapters of a rank's model chunks: made, filled, switched off, merged, begun anew."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_irl import hardware
from megatron_irl.adapters.lora import LoraAdapter, attach
from megatron_irl.adapters.sharding import save_adapters_only
from megatron_irl.adapters.spec import AdapterSpec
from megatron_irl.convert.load import global_parameters
from megatron_irl.convert.peft_folder import PeftFolder, require_finite
from megatron_irl.families.architecture import Architecture
from megatron_irl.families.table import ADAPTER, HEAD, heads
from megatron_irl.families.tensors import Replicated, Split
from megatron_irl.model.build import unwrap
from megatron_irl.parallel.topology import Topology

BLOCK = 1 << 26  # elements of an update that exist at one time in float32


class Adapters:
    """The adapters of a model on this rank; see ``add_adapters``, which makes them.

    Args:
        layers: By the base weight's canonical name, its layer.

    The base below them never changes but by ``merge_and_begin``.

    Example:
        adapters = add_adapters(chunks, spec, arch, topology)    # before DDP wraps the chunks
        with adapters.merged():
            ...                                                  # weights hold the updates
        with adapters.off():
            ...                                                  # the model is its base
    """

    def __init__(
        self, spec: AdapterSpec, arch: Architecture, topology: Topology, layers: dict[str, Any]
    ) -> None:
        self.spec, self.arch, self.topology = spec, arch, topology
        self.layers = layers
        self.rounds_merged = 0
        self._started: list[Tensor] | None = None  # what ``spec.start`` held
        self._base: list[Tensor] | None = None  # in host memory; see ``merged``

    @property
    def modules(self) -> list[LoraAdapter]:
        """In the order of the forward pass."""
        return [getattr(layer, ADAPTER) for layer in self.layers.values()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all of them."""
        return [p for module in self.modules for p in (module.lora_A, module.lora_B)]

    @property
    def num_parameters(self) -> int:
        """Of this rank."""
        return sum(p.numel() for p in self.parameters)

    @torch.no_grad()
    def begin(self, round_index: int = 0) -> None:
        """Random A and zero B, the same under every layout; of a round its own."""
        # Drawn whole and on the CPU by every rank, by name, then cut: no layout changes a number.
        for module in self.modules:
            module.lora_A.copy_(self._shard_A(module, [
                _random_A(self.spec, name, self._input_size(module), round_index)
                for name in module.layer.modules
            ]))
            module.lora_B.zero_()

    @torch.no_grad()
    def read(self, folder: PeftFolder) -> None:
        """Take the matrices of a folder whose layers are these.

        Raises:
            UserError: They are not finite. Collectives: none.
        """
        for module in self.modules:
            layer = module.layer
            pairs = {
                part: folder.tensors(name)
                for part, name in zip(layer.parts, layer.modules, strict=True)
            }
            for name, (a, b) in zip(layer.modules, pairs.values(), strict=True):
                require_finite(name, a, folder.folder)
                require_finite(name, b, folder.folder)
            module.lora_A.copy_(self._shard_A(module, [a for a, _ in pairs.values()]))
            whole = [
                pairs[part][1] if part in pairs
                else torch.zeros(tensor.shape(self.arch)[0], self.spec.rank)
                for part, tensor in enumerate(layer.row.hf)
            ]
            transform: Any = layer.row.transform
            if layer.splits_input:
                transform = Replicated()  # B is whole
            module.lora_B.copy_(self._read(transform, whole))

    def keep_start(self) -> None:
        """Remember the adapters as they are, on the host: what the run began with."""
        self._started = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model is its base."""
        with self._applied(False):
            yield

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Within the block the model is what the run began with, on the base as it is now.

        No weight is read and nothing but a start adapter copied.
        """
        if self._started is None:
            with self.off():
                yield
            return
        with self.set_aside():
            self._fill(self._started)
            yield

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block the matrices may be changed; afterwards they are what they were."""
        # Filled in place and back: DDP's buffers and CUDA graphs know the matrices by address.
        aside = [p.detach().clone() for p in self.parameters]
        try:
            yield
        finally:
            self._fill(aside)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block the base weights hold the updates, in place, and no adapter runs.

        Afterwards the base is bitwise what it was: its weights are kept in (pinned) host memory
        from the first time on, as often as this is used. Addresses stay, and so CUDA graphs valid.

        Collectives: none.
        """
        weights = [layer.weight for layer in self.layers.values()]
        if self._base is None:
            self._base = [hardware.to_host(weight) for weight in weights]
        try:
            with self._applied(False):
                self._merge()
                yield
        finally:
            with torch.no_grad():
                for weight, kept in zip(weights, self._base, strict=True):
                    weight.copy_(kept, non_blocking=True)
            hardware.synchronize()

    def merge_and_begin(self, round_index: int) -> None:
        """Add the updates to the base for good and begin anew on it.

        The optimizer must be told (``reload_main_params``). Collectives: none.
        """
        self.merge_for_good()
        self.begin(round_index)

    def merge_for_good(self) -> None:
        """Add the updates to the base; what is in the adapters then counts twice."""
        self._merge()
        self._base = None
        self.rounds_merged += 1

    @torch.no_grad()
    def _merge(self) -> None:
        for layer in self.layers.values():
            module: LoraAdapter = getattr(layer, ADAPTER)
            weight = layer.weight
            step = max(1, BLOCK // weight.shape[1])
            for start in range(0, weight.shape[0], step):
                # Summed in fp32 and rounded once, in blocks whose bounds never change: a run that
                # resumes and merges again comes to the same bits.
                rows = slice(start, min(start + step, weight.shape[0]))
                weight[rows] = (weight[rows].float() + module.update(rows)).to(weight.dtype)

    @contextmanager
    def _applied(self, applied: bool) -> Iterator[None]:
        before = [module.is_applied for module in self.modules]
        for module in self.modules:
            module.is_applied = applied
        try:
            yield
        finally:
            for module, was in zip(self.modules, before, strict=True):
                module.is_applied = was

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _shard_A(self, module: LoraAdapter, whole: Sequence[Tensor]) -> Tensor:
        transform = Split(1) if module.layer.splits_input else Replicated()
        return self._read(transform, [torch.cat([a[:] for a in whole])])

    def _read(self, transform: Any, whole: Sequence[Tensor]) -> Tensor:
        t = self.topology
        return transform.read(whole, t.tp_rank, t.tp_size, heads(self.arch))

    def _input_size(self, module: LoraAdapter) -> int:
        return module.layer.row.hf[0].shape(self.arch)[1]


def add_adapters(
    chunks: Sequence[nn.Module], spec: AdapterSpec, arch: Architecture, topology: Topology
) -> Adapters:
    """Freeze bare chunks and give their targeted layers adapters.

    Before heads are attached and before DDP, which then holds buffers for adapters alone. A
    checkpoint of the chunks holds the adapters and no base weight.

    Raises:
        UserError: ``spec.start`` cannot be read. Collectives: none.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
        module: Any
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # into buffers that are not there
                module.fuse_wgrad_accumulation = False
        _feed_gradients(chunk)
    targets = {layer.row.megatron: layer for layer in spec.layers}
    layers: dict[str, Any] = {}
    for name, layer in named_linears(chunks):
        if name in targets:
            adapter = LoraAdapter(targets[name], layer, spec, arch, topology)
            attach(layer, adapter)
            layers[name] = layer
    adapters = Adapters(spec, arch, topology, layers)
    if spec.start is None:
        adapters.begin()
    else:
        adapters.read(spec.start)
        adapters.keep_start()
    for chunk in chunks:
        save_adapters_only(chunk, layers, topology)
    return adapters


def remove_adapters(adapters: Adapters) -> None:
    """Leave plain layers, as they are merged, for inference."""
    for layer in adapters.layers.values():
        delattr(layer, ADAPTER)
        if hasattr(layer, "return_layernorm_output"):
            layer.return_layernorm_output = False
        for key, hook in list(layer._forward_hooks.items()):
            if hook.__module__ == LoraAdapter.__module__:
                del layer._forward_hooks[key]


def named_linears(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Linear layers of bare chunks by the canonical name of their weight."""
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        owners = {id(m._parameters.get("weight")): m for m in chunk.modules()}
        for name, parameter in global_parameters([chunk]):
            module = owners.get(id(parameter))
            if module is not None and (parameter.dim() == 2 or name == HEAD):
                yield name, module


def _feed_gradients(chunk: Any) -> None:
    """Let recomputation of frozen layers see an input that wants a gradient.

    Reentrant checkpointing gives no gradient to what is inside unless its input wants one; the
    embedding, which is frozen, makes that input.
    """
    if not chunk.pre_process or chunk.config.recompute_granularity is None:
        return

    def hook(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    chunk.embedding.register_forward_hook(hook)


def _random_A(spec: AdapterSpec, name: str, size: int, round_index: int) -> Tensor:
    """[r, size] of a module, as peft draws it: uniform (``kaiming``), or normal of 1 / r."""
    text = f"{spec.seed} {round_index} {name}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.empty(spec.rank, size, dtype=torch.float32)
    if spec.init == "normal":
        return matrix.normal_(0.0, 1 / spec.rank, generator=generator)
    bound = 1 / math.sqrt(size)  # kaiming_uniform_ with a = sqrt(5)
    return matrix.uniform_(-bound, bound, generator=generator)
