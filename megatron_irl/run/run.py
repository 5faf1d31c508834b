"""A run in progress on this rank: who owns what."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_irl.algorithms.base import Algorithm
from megatron_irl.config import Recipe
from megatron_irl.console import Console
from megatron_irl.data.corpus import Corpus
from megatron_irl.evaluation.heldout import Evaluator
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.policy import Policy
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.prediction import Prediction
from megatron_irl.run.recorder import Recorder
from megatron_irl.run.speed import Speedometer
from megatron_irl.run.state import RunState
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.train.step import Trainer

BASE = "base"  # of adapters: the digest of the model below them, in a checkpoint's state
NUM_PROBES = 8  # demonstrations that must have a finite likelihood before weights are saved


@dataclass
class Run:
    """The owners of a run, each built once by ``open_run``. Only the loop holds them all.

    Attributes:
        recipe: Resolved.
        policy: The weights: scores and generates.
        trainer: The optimizer: updates the policy.
        data: What is learnt from; ``bank`` and ``previous_bank`` hold the pairs drawn on the way.
        evaluator: Judges the policy on held-out data.
        folder, checkpointer: What is on disk.
        state, clock: Where the run stands, and where its time goes.
        recorder, console: What it says about itself.
        sampling: How samples are drawn; its seed is the run's.
        companions: What an exported folder has besides weights.
        speedometer: How fast it is beside what its device could do.
        prediction: What the planner says; on the main rank of a run that begins on a known GPU.
        saved: (step, round, step in round) of the newest checkpoint, or of the run's start.

    Example:
        ::

            inputs = read_inputs(load_recipe("recipe.yaml"))
            lease = hold(inputs.folder.path, topology)       # storage.shared_folder
            run = open_run(inputs, topology, sys.argv, lease)
            run.policy.score(...); run.save()
    """

    recipe: Recipe
    algorithm: Algorithm
    topology: Topology
    policy: Policy
    trainer: Trainer
    data: Corpus
    bank: SharedBank
    previous_bank: SharedBank
    evaluator: Evaluator
    folder: RunFolder
    checkpointer: Checkpointer
    state: RunState
    clock: Clock
    recorder: Recorder
    console: Console
    sampling: SamplingConfig
    companions: dict[str, Any]
    speedometer: Speedometer
    prediction: Prediction | None = None
    saved: tuple[int, int, int] | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.saved = self._position()
        self.trainer.stepper.lr_scale = self.state.lr_scale

    @property
    def reference_weights(self) -> Path | None:
        """HF folder that the reference's weights come from; None while the policy is they."""
        is_initial = self.recipe.algorithm.reference == "initial"
        return Path(self.recipe.model.hf) if is_initial and self.state.step > 0 else None

    def save(self, then: Callable[[], None] | None = None) -> None:
        """Checkpoint the run as it stands. Collective.

        Everything that the state refers to is on disk before: pairs, ledger and logs are written
        when they are made.

        Args:
            then: Called on every rank after the checkpoint is in its place, maybe later.

        Raises:
            TrainingDiverged: The weights give no finite log-probability; nothing is saved, and
                the newest checkpoint stays a good one.
            UserError: The disk is full.
        """
        with self.topology.heart.within("checkpoint", slow=True):
            self._save(then)
        self.saved, self._saved_at = self._position(), time.monotonic()

    def save_unless_saved(self) -> None:
        """As ``save``, if the newest checkpoint is not of where the run stands. Collective."""
        if self.saved != self._position():
            self.save()

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is in its place. Collective. Raises as ``save``."""
        with self.topology.heart.within("checkpoint", slow=True):
            self.checkpointer.wait()

    def seconds_since_save(self) -> float:
        """Since the last save of this process, or since it opened the run."""
        return time.monotonic() - self._saved_at

    def _position(self) -> tuple[int, int, int]:
        return self.state.step, self.state.round, self.state.step_in_round

    def _save(self, then: Callable[[], None] | None) -> None:
        # The forward also completes an exchange of parameters that is pending under
        # ddp.overlap_param_gather; without one the model would be saved with other ranks' old ones.
        probe = self.data.demonstrations[:NUM_PROBES]
        self.policy.score([(d.prompt_ids, d.response_ids) for d in probe])
        # Clocks differ between ranks. A checkpoint has one state, and Megatron compares what the
        # ranks bring to it, so everybody brings the main rank's.
        state = on_main(self._state, self.topology)
        self.checkpointer.save(
            self.state.step, self.policy.chunks, self.trainer.optimizer, self.trainer.scheduler,
            state, then,
        )

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and optimizer."""
        state = self.state.to_dict() | {"log": self.recorder.log.recent()}
        if self.policy.adapters is not None:
            state |= {BASE: self.folder.start.get("model.hf")}
        return state
