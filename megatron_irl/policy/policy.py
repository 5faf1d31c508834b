"""The policy on its ranks: weights, and what can be asked of them. No optimizer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_irl.adapters.adapters import Adapters
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.load import load_hf_weights_once
from megatron_irl.data.packing import alignment
from megatron_irl.generation.borrow import complete_gather
from megatron_irl.generation.interface import Ends, Finished, SamplingConfig
from megatron_irl.generation.interface import Progress as OnGenerated
from megatron_irl.model.data_parallel import wrap_data_parallel
from megatron_irl.parallel.reduce import gather_in_turn
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.pipeline_sampling import PolicyGenerator
from megatron_irl.policy.schedule import PipelineSchedule
from megatron_irl.policy.scoring import (
    PACK_TOKENS,
    OnProgress,
    Sequences,
    Sums,
    check_finite,
    score_in_packs,
    sum_in_packs,
)
from megatron_irl.policy.set_aside import weights_set_aside
from megatron_irl.types import PackedBatch, Sample

from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip
from megatron.core.utils import get_model_config  # isort: skip


class Policy:
    """A model spread over ranks that scores and generates.

    Training, evaluation, ``score``, ``generate`` and the checks of a conversion all ask this one
    object; the optimizer that changes its weights is somebody else's (``train.step.Stepper``).

    Args:
        chunks: This rank's model chunks, one per virtual pipeline stage, bare or wrapped.
        topology: This rank's place.
        architecture: What the weights are.
        rows_at_once: Response rows whose logits exist at one time.
        adapters: Those of the chunks, if they have any.
        samples_merged: Sample with the adapters merged into the weights.
        share_prompts: Scores of neighbours with one prompt compute it once.

    Attributes:
        config: Megatron's TransformerConfig of the chunks.
        multiple_of: What the token count of a pack must be a multiple of here.

    Example:
        ::

            topology = initialize(parallel)
            chunks = build_chunks(build_config(arch, parallel), arch, topology)
            policy = Policy(chunks, topology, arch)
            policy.load_weights(hf_dir)
            logprobs = policy.score([(prompt_ids, response_ids)])       # in nats, per token
            policy.open_generator(max_sequence_length=512)
            samples = policy.generate([prompt_ids], SamplingConfig(seed=1, eos_id=2))
    """

    def __init__(
        self, chunks: Sequence[Any], topology: Topology, architecture: Architecture, *,
        rows_at_once: int = 2048, adapters: Adapters | None = None, samples_merged: bool = True,
        share_prompts: bool = True,
    ) -> None:
        self.chunks, self.topology, self.architecture = list(chunks), topology, architecture
        self.config: Any = get_model_config(self.chunks[0])
        # Once, here: while the model is lent to the engine its config says less than this.
        self.multiple_of = alignment(
            self.config.tensor_model_parallel_size, self.config.sequence_parallel,
            self.config.context_parallel_size, self.config.fp8_recipe if self.config.fp8 else None)
        self._packing: dict[str, Any] = {
            "multiple_of": self.multiple_of, "share_prompts": share_prompts}
        self.rows_at_once = rows_at_once
        self.adapters, self.samples_merged = adapters, samples_merged
        self.schedule = PipelineSchedule(self.chunks, topology, rows_at_once=rows_at_once)
        self.generator: PolicyGenerator | None = None

    def for_training(self, ddp_config: DistributedDataParallelConfig) -> "Policy":
        """The same weights over Megatron's DDP, which owns the gradient buffers.

        Before a generator is opened. Collectives: as DDP's construction, every rank calls.
        """
        assert self.generator is None, "the generator would keep the bare chunks"
        wrapped = wrap_data_parallel(self.chunks, self.config, self.topology, ddp_config)
        return Policy(
            wrapped, self.topology, self.architecture, rows_at_once=self.rows_at_once,
            adapters=self.adapters, samples_merged=self.samples_merged,
            share_prompts=self._packing["share_prompts"])

    # --- weights

    def load_weights(self, hf_dir: Path) -> None:
        """Read HF weights into the model in place. Raises as ``load_hf_weights``. Collective."""
        load_hf_weights_once(self.chunks, self.architecture, hf_dir, self.topology)

    def complete_gather(self) -> None:
        """Complete DDP's pending exchange of parameters, before somebody reads them.

        Collectives: with ``overlap_param_gather`` over data parallelism.
        """
        complete_gather(self.chunks)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block the weights are the policy's, its adapters included.

        Without adapters they always are. Collectives: with ``overlap_param_gather`` a parameter
        all-gather over data parallelism.
        """
        if self.adapters is None:
            yield
            return
        self.complete_gather()  # the update is made of A and B, which must be those of all replicas
        with self.adapters.merged():
            yield

    @contextmanager
    def with_weights_of(self, hf_dir: Path | None) -> Iterator[None]:
        """Swap in the weights a run began with, of an HF folder, and the policy's back afterwards.

        The policy's weights are set aside in memory for this one pass; during optimisation there is
        no second copy. None swaps nothing. A policy of adapters, whose base is that folder, only
        switches them off, or back to those it began with; nothing is read unless it has merged some
        into the base.

        Collectives: every rank must call; one replica reads the folder, the others receive.
        """
        with ExitStack() as stack:
            if hf_dir is not None and self.adapters is not None:
                self.complete_gather()  # or it would arrive over the adapters that are filled in
                stack.enter_context(self.adapters.at_start())
                if not self.adapters.rounds_merged:
                    hf_dir = None
            if hf_dir is not None:
                stack.enter_context(weights_set_aside(self.chunks))
                with self.topology.heart.within("reading reference weights", slow=True):
                    self.load_weights(hf_dir)
            yield

    # --- scores

    def token_logprobs(self, microbatches: Sequence[PackedBatch]) -> list[list[Tensor]]:
        """Per microbatch, per sequence: float32 response log-probabilities on the CPU.

        Evaluation mode, no gradient. Empty except on the last pipeline stage.
        Collectives: tensor and pipeline parallel ranks of one replica must call together.
        """
        return [
            list(out.cpu().split(batch.lengths_S.tolist()))  # a sync for each microbatch
            for out, batch in self.schedule.evaluate(microbatches, "logprobs")
        ]

    def rewards(self, microbatches: Sequence[PackedBatch]) -> list[list[Tensor]]:
        """Per microbatch, per sequence: the float32 scalar reward on the CPU.

        Evaluation mode, no gradient; the model must have a reward head. Empty except on the last
        pipeline stage.
        Collectives: tensor and pipeline parallel ranks of one replica must call together.
        """
        # A sync for each microbatch here too, when all of them are queued.
        return [list(out.cpu()) for out, _ in self.schedule.evaluate(microbatches, "rewards")]

    def score(
        self, sequences: Sequences, *, max_tokens: int = PACK_TOKENS,
        on_progress: OnProgress | None = None,
    ) -> list[np.ndarray]:
        """Token log-probabilities of every response under the weights as they are.

        Args:
            sequences: (prompt ids, response ids), the same list on every rank.
            max_tokens: Tokens of one packed forward.
            on_progress: Called with about the number of sequences finished so far, over all ranks.

        Returns:
            Per sequence float32 [response tokens], nats, in input order, on every rank.

        Gradient: none. Collectives: every rank of the run must call.

        Raises:
            TrainingDiverged: A log-probability is NaN or infinite: the weights are no good.
        """
        scores = score_in_packs(
            self.token_logprobs, sequences, self.topology, max_tokens=max_tokens, **self._packing,
            on_progress=on_progress,
        )
        # After the exchange: every rank has all scores, so all of them find the same and raise.
        check_finite(np.array([values.sum() for values in scores]), "log-probabilities")
        return scores

    def score_sums(
        self, sequences: Sequences, *, against: Sequence[np.ndarray | None] | None = None,
        alone: bool = False, on_progress: OnProgress | None = None,
    ) -> Sums:
        """Log-probabilities of whole responses; as ``score``, but tokens stay on their ranks.

        Args:
            against: Per sequence float32 [response tokens] to compare with, or None.
            alone: The sequences are this replica's own, and so is the answer.

        Collectives: the ranks of a replica if ``alone``, else every rank of the run.
        """
        sums = sum_in_packs(
            self.token_logprobs, sequences, self.topology,
            lambda i, values: Sums.of(values, against[i] if against is not None else None),
            alone=alone, **self._packing, on_progress=on_progress,
        )
        found = Sums(*sums.reshape(-1, 4).T)
        check_finite(found.logp, "log-probabilities")
        return found

    def score_choices(
        self, sequences: Sequences, *, on_progress: OnProgress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of whole responses, and whether greedy decoding would give them.

        Returns:
            float64 [n] in nats and bool [n], on every rank.

        Args, collectives: as ``score``.
        """
        def choices(microbatches: Sequence[PackedBatch]) -> list[list[Tensor]]:
            return [list(out.cpu().split(batch.lengths_S.tolist()))
                    for out, batch in self.schedule.evaluate(microbatches, "choices")]

        found = sum_in_packs(
            choices, sequences, self.topology,
            lambda _, v: (float(v[:, 0].sum(dtype=np.float64)), float(v[:, 1].min())),
            alone=False, **self._packing, on_progress=on_progress,
        ).reshape(-1, 2)
        check_finite(found[:, 0], "log-probabilities")
        return found[:, 0], found[:, 1] == 1

    def score_rewards(
        self, sequences: Sequences, *, alone: bool = False, max_tokens: int = PACK_TOKENS,
        on_progress: OnProgress | None = None,
    ) -> list[float]:
        """The explicit reward of every response; as ``score_sums``.

        Raises:
            TrainingDiverged: A reward is NaN or infinite.
        """
        rewards = sum_in_packs(
            self.rewards, sequences, self.topology, lambda _, value: float(value), alone=alone,
            max_tokens=max_tokens, **self._packing, on_progress=on_progress,
        )
        check_finite(rewards, "rewards")
        return rewards.tolist()

    # --- generation

    def open_generator(self, **options: Any) -> None:
        """Make ready to generate, with what ``PolicyGenerator`` and ``MegatronGenerator`` take.

        Memory is taken by the first ``generate``. Collectives: none.
        """
        self.generator = PolicyGenerator(
            self.chunks, self.topology, self.architecture,
            vocab_size=self.architecture.vocab_size,
            unmerged=self.adapters is not None and not self.samples_merged, **options,
        )

    def sampling_ranks(self) -> Topology:
        """This rank's place as generation has it, until ``release_cache``.

        ``topology``, or one where the stages of a pipeline are replicas too. Collective: all ranks.
        """
        assert self.generator is not None, "open_generator comes first"
        return self.generator.ranks()

    def generate_share(
        self, prompts: Sequence[np.ndarray], sampling: SamplingConfig,
        on_progress: OnGenerated | None = None, *, keys: Sequence[int],
        on_finished: Finished | None = None, max_new_tokens: Sequence[int] | None = None,
    ) -> list[Sample]:
        """A response to every prompt of this replica, by ``sampling_ranks``.

        Args:
            max_new_tokens: A budget of each prompt's own.

        Collectives: every rank calls, those of a replica with equal arguments, maybe with nothing.
        """
        assert self.generator is not None, "open_generator comes first"
        with self._ready_to_sample():
            return self.generator.generate(
                prompts, sampling, on_progress, keys=keys, on_finished=on_finished,
                max_new_tokens=max_new_tokens,
            )

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingConfig,
        on_progress: OnGenerated | None = None, *, keys: Sequence[int] | None = None,
        on_finished: Finished | None = None, ends: Ends | None = None,
    ) -> list[Sample]:
        """A response to every prompt, split over the replicas; all samples on every rank.

        Args:
            prompts: int32 token ids, the same list on every rank.
            on_progress: Called with what this replica has done: (responses, tokens).
            keys: One integer per prompt (its position by default): with the seed, all that its
                sample depends on, so that neither layout nor batching changes a sample.
            on_finished, ends: As in ``Generator.generate``; called for this replica's share, with
                positions in ``prompts``.

        Collectives: every rank must call.
        """
        assert self.generator is not None, "open_generator comes first"
        topology = self.sampling_ranks()
        # Dealt in turn: prompts are often sorted, by length or by source.
        share = slice(topology.dp_rank, None, topology.dp_size)
        keys = range(len(prompts)) if keys is None else keys
        places = range(len(prompts))[share]
        with self._ready_to_sample():
            samples = self.generator.generate(
                list(prompts[share]), sampling, on_progress, keys=keys[share],
                on_finished=on_finished and (lambda i, sample: on_finished(places[i], sample)),
                ends=ends and (lambda i, token_ids: ends(places[i], token_ids)),
            )
        # Replicas that are done wait here for the slowest one.
        return gather_in_turn(samples, topology)

    def _ready_to_sample(self) -> AbstractContextManager[None]:
        return self.merged() if self.samples_merged else nullcontext()

    def note_update(self) -> None:
        """Whoever updates the weights says so: memory in use is then what training takes."""
        if self.generator is not None:
            self.generator.residency.note_update()

    def generation_costs(self) -> dict[str, Any]:
        """What generation cost beside its time, on this rank; see ``PolicyGenerator.costs``."""
        return {} if self.generator is None else self.generator.costs()

    def release_cache(self) -> None:
        """A phase of generation ends: free the cache, unless training leaves room for it.

        ``generate`` may be called again. Collectives: every rank of a replica must call.
        """
        if self.generator is not None:
            self.generator.pause()
