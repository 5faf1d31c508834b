"""Whether the KV cache and its CUDA graphs may stay while the model trains, by measured memory."""

from typing import Literal

from megatron_irl import hardware
from megatron_irl.parallel.agreement import any_of_replica
from megatron_irl.parallel.topology import Topology

KeepCache = Literal["auto", "true", "false"]

SPARE = 0.05  # of the device's memory, for what the next phase may need beyond what it needed


class Residency:
    """Peaks of the two phases, and the decision they lead to.

    Args:
        keep: ``auto`` decides by memory, and frees until a phase of training has been measured.

    Attributes:
        cache_bytes, weight_bytes: What is held for generation: cache and graphs, and weights
            beside the trained ones.
        peak_train: Most bytes at once of the phase of training that needed most of its own.
        peak_generation: Most bytes at once of the last phase of generation.
    """

    def __init__(self, keep: KeepCache, topology: Topology) -> None:
        self._keep, self._topology = keep, topology
        # Bytes that stay for generation now, and that stayed in the phase of ``peak_train``.
        self._staying = self._resident = 0
        self.cache_bytes = self.weight_bytes = 0
        self.peak_train: int | None = None
        self.peak_generation = 0
        self._between, self._stays, self._updated = False, False, False

    def begin_generation(self) -> None:
        """Generation starts; if the model was updated since the last phase, that was training."""
        if self._updated:
            peak = hardware.peak_memory()
            if self.peak_train is None or peak - self._staying > self.peak_train - self._resident:
                self.peak_train, self._resident = peak, self._staying
        if self._between:
            hardware.reset_peak_memory()
        self._between = self._updated = False

    def note_update(self) -> None:
        """An optimizer step has been taken: what the device holds by now is what training takes."""
        self._updated = True

    def end_generation(self) -> bool:
        """Generation ends. Returns whether cache and graphs stay.

        Collectives: with ``auto`` on CUDA one all-reduce over the model-parallel group, because a
        replica's ranks must decide alike: capturing again is collective.
        """
        if self._between:  # twice in a row: nothing has been generated in between
            return self._stays
        self.peak_generation = hardware.peak_memory()
        self._stays = self._decide()
        self._staying = self.cache_bytes + self.weight_bytes if self._stays else 0
        hardware.reset_peak_memory()
        self._between = True
        return self._stays

    def fits(self, total: int, foreign: int) -> bool:
        """Whether training at its measured peak leaves room for cache and graphs.

        Args:
            total, foreign: Bytes of the device, and of others on it.
        """
        if self.peak_train is None:
            return False
        training = self.peak_train - self._resident
        stays = self.cache_bytes + self.weight_bytes
        return training + stays + foreign + SPARE * total <= total

    def _decide(self) -> bool:
        if self._keep != "auto" or not hardware.IS_CUDA:
            return self._keep == "true"
        stays = self.fits(hardware.total_memory(), hardware.foreign_memory())
        # Memory differs between ranks (first and last stages hold embeddings). One that has no room
        # decides for all of its replica.
        return not any_of_replica(not stays, self._topology)
