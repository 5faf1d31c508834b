"""How fast a run is beside what its device could do: for ``metrics.jsonl`` and ``rounds.jsonl``."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_irl import hardware
from megatron_irl.families.architecture import Architecture
from megatron_irl.flops import Tokens, experts_hit, layer_parameters, training_flops
from megatron_irl.parallel.topology import Topology
from megatron_irl.planning.machines import GIB, Machine, machine_of_device


class Speedometer:
    """Turns work and seconds into utilisation.

    Model FLOPs are counted from the packs: matrices of the layers for every token (of a mixture's
    experts those that a token goes to), attention by the squares of the sequences' lengths, the
    language-model head on response rows only. What is recomputed is not counted, nor are weight
    gradients of frozen weights.

    Args:
        chunks: This rank's, to tell whether an adapter is trained alone.

    Attributes:
        machine: The device, if its peak is known: else there is no ``train/mfu``.
    """

    def __init__(self, arch: Architecture, topology: Topology, chunks: Sequence[Any]) -> None:
        self._arch, self._replicas = arch, topology.dp_size
        self._ranks = topology.tp_size * topology.pp_size  # of a replica
        self.machine = known_machine()
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        # An adapter is some percent of a model. (What a phase freezes keeps ``requires_grad``.)
        is_adapter = trained < 0.5 * sum(p.numel() for p in parameters)
        # Of the whole model: stages hold equally many layers, and so equally much of an adapter.
        self._adapter = trained * self._ranks if is_adapter else None

    def step(self, work: Tokens, seconds: float, *, has_head: bool) -> dict[str, float]:
        """Of one optimizer step, by device.

        ``train/tflops_padded`` is what a trainer would show that pads every sequence to the longest
        of the step and computes the head on all of them, at this speed.

        Args:
            work: Of this rank's replica.
        """
        flops, padded = (
            training_flops(self._arch, t, head=has_head, adapter_parameters=self._adapter)
            / seconds / self._ranks for t in (work, work.padded)
        )
        found = {"train/tflops": flops / 1e12, "train/tflops_padded": padded / 1e12}
        if self.machine is not None:
            found["train/mfu"] = flops / self.machine.bf16
        return found | memory_peaks()

    def generation(self, record: Mapping[str, Any], max_requests: int) -> dict[str, float]:
        """Of a round's generation: the share of the memory's bandwidth that it took at least.

        At least, because every step is taken to have had all places full: weights are read once for
        so many tokens. The cache is not counted. Of a mixture's experts those are that so many
        tokens hit on average if all are equally likely.

        Args:
            record: ``tokens_per_second`` of it, over all replicas.
        """
        rate = record.get("tokens_per_second")
        if not rate or self.machine is None:
            return {}
        layers = self._arch.transformer["num_layers"]
        hit = experts_hit(self._arch, max_requests)
        weights = layers * layer_parameters(self._arch, hit)
        weights += self._arch.dims["hidden"] * self._arch.vocab_size
        read = 2.0 * weights * rate / self._replicas / max_requests / self._ranks
        return {"bandwidth_utilisation": read / self.machine.bandwidth}


def known_machine() -> Machine | None:
    """This process's device, if its peak is known."""
    return machine_of_device(hardware.device_name())


def memory_peaks() -> dict[str, float]:
    """GiB: of the device what tensors took and what the allocator held, since the phase began; on
    a CPU the most that the process has had.
    """
    if not hardware.IS_CUDA:
        return {"memory/peak_process": hardware.peak_process_memory() / GIB}
    return {"memory/peak_allocated": hardware.peak_memory() / GIB,
            "memory/peak_reserved": hardware.peak_reserved_memory() / GIB}
