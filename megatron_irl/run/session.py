"""Everything a run holds, built once: the order here is the order in which errors surface."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_irl import hardware
from megatron_irl.config import Recipe, resolve
from megatron_irl.console import Progress
from megatron_irl.convert.certificate import certificate_notes
from megatron_irl.convert.hf_config import Architecture, architecture, read_hf_config
from megatron_irl.convert.load import load_hf_weights, validate_hf_folder
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.digest import digest_of
from megatron_irl.data.ledger import discard_ledger_after
from megatron_irl.data.packing import alignment
from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.preferences import Preference, load_preferences
from megatron_irl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.generation.cache_size import cache_gb, default_block_tokens
from megatron_irl.generation.interface import Generator
from megatron_irl.generation.megatron_engine import MegatronGenerator
from megatron_irl.model.build import (
    build_chunks,
    build_config,
    build_ddp_config,
    wrap_data_parallel,
)
from megatron_irl.model.reward_head import attach_reward_head
from megatron_irl.parallel.reduce import from_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.scoring import score_sequences
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.recorder import Recorder
from megatron_irl.run.state import RunState
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.train.optimizer import build_optimizer, build_optimizer_config, shards_optimizer
from megatron_irl.train.step import Stepper
from megatron_irl.types import Demonstration

NUM_PROBES = 8  # demonstrations that must have a finite likelihood before weights are saved


@dataclass
class Session:
    """A run in progress on this rank."""

    recipe: Recipe
    topology: Topology
    folder: RunFolder
    tokenizer: Tokenizer
    demonstrations: list[Demonstration]
    heldout: list[Demonstration]
    preferences: list[Preference]
    heldout_preferences: list[Preference]
    architecture: Architecture
    hf_config: dict[str, Any]
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    stepper: Stepper
    generator: Generator
    checkpointer: Checkpointer
    bank: PairBank
    heldout_bank: PairBank
    previous_bank: PairBank
    recorder: Recorder
    progress: Progress
    multiple_of: int
    state: RunState = field(default_factory=RunState)
    inner_seconds: float = 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block to ``phase`` of the round; time of inner blocks is theirs."""
        outer, self.inner_seconds = self.inner_seconds, 0.0
        hardware.synchronize()
        start = time.perf_counter()
        yield
        hardware.synchronize()
        elapsed = time.perf_counter() - start
        seconds = elapsed - self.inner_seconds
        self.inner_seconds = outer + elapsed
        self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + seconds
        if phase == "generation":
            self.recorder.generated(seconds)

    @property
    def samples_per_prompt(self) -> int:
        """Responses sampled for each prompt of a round."""
        is_rft = self.recipe.algorithm.name == "rft"
        return self.recipe.policy.samples_per_prompt if is_rft else 1

    @property
    def hf_dir(self) -> Path:
        """The HF folder the run started from."""
        return Path(self.recipe.model.hf)

    def save(self) -> None:
        """Checkpoint the run as it stands. Collective.

        Raises:
            TrainingDiverged: The weights give no finite log-probability; nothing is saved, and
                the newest checkpoint stays a good one.
            UserError: The disk is full.
        """
        probe = [(d.prompt_ids, d.response_ids) for d in self.demonstrations[:NUM_PROBES]]
        score_sequences(self.stepper, probe, multiple_of=self.multiple_of)
        self.checkpointer.save(
            self.state.step, self.chunks, self.optimizer, self.scheduler, self.state.to_dict()
        )


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked before anything expensive is built."""

    recipe: Recipe
    tokenizer: Tokenizer
    demonstrations: list[Demonstration]
    heldout: list[Demonstration]
    preferences: list[Preference]
    heldout_preferences: list[Preference]
    architecture: Architecture
    hf_config: dict[str, Any]
    data_digest: str
    notes: list[str]


def read_inputs(recipe: Recipe, *, check_hardware: bool = True) -> Inputs:
    """Read and check recipe, model folder, data and output folder; needs no process group.

    Without ``check_hardware`` the recipe may ask for what this machine does not have.

    Raises:
        UserError: Anything that is wrong with the user's input.
    """
    hf_dir = Path(recipe.model.hf)
    folder = RunFolder(Path(recipe.output_dir))
    folder.check_place()  # reading the data may take minutes
    hf_config = read_hf_config(hf_dir)
    arch = architecture(hf_config)
    config = build_config(
        arch, recipe.parallel, precision=recipe.precision, overrides=recipe.model.overrides,
        check_hardware=check_hardware,
    )
    build_optimizer_config(recipe, config)
    build_ddp_config(recipe.ddp)
    check_lengths(recipe, arch, config)
    validate_hf_folder(hf_dir, arch)
    tokenizer = load_tokenizer(recipe.data.tokenizer or hf_dir, recipe.data.chat_template)
    check_vocabulary(tokenizer, arch)
    limits = {
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_response_length": recipe.data.max_response_length,
        "overlong": recipe.data.overlong,
    }
    demonstrations, report = load_demonstrations(recipe.data.train, tokenizer, **limits)
    notes = [*certificate_notes(hf_dir), f"data.train: {report.summary()}"]
    heldout: list[Demonstration] = []
    if recipe.data.eval:
        heldout, eval_report = load_demonstrations(
            recipe.data.eval, tokenizer, limit=recipe.data.eval_limit, **limits
        )
        notes.append(f"data.eval: {eval_report.summary()}")
    preferences = _read_preferences("reward.preferences", recipe.reward.preferences, recipe,
                                    tokenizer, notes)
    heldout_preferences = _read_preferences("data.eval_preferences", recipe.data.eval_preferences,
                                            recipe, tokenizer, notes)
    resolved = resolve(recipe, len(demonstrations))
    data_digest = digest_of([
        *((d.prompt_ids, d.response_ids) for d in demonstrations),
        *((p.prompt_ids, ids) for p in preferences for ids in (p.chosen_ids, p.rejected_ids)),
    ])
    folder.check(resolved, data_digest)
    return Inputs(resolved, tokenizer, demonstrations, heldout, preferences, heldout_preferences,
                  arch, hf_config, data_digest, notes)


def check_lengths(recipe: Recipe, arch: Architecture, config: Any) -> None:
    """Raise UserError unless the model and the KV cache hold the longest sequences."""
    generated = generation_length(recipe)
    longest = max(generated, recipe.data.max_prompt_length + recipe.data.max_response_length)
    if longest > arch.max_sequence_length:
        raise UserError(
            f"data.max_prompt_length={recipe.data.max_prompt_length} plus responses of up to "
            f"{longest - recipe.data.max_prompt_length} tokens conflicts with the model's "
            f"max_position_embeddings={arch.max_sequence_length}. Set data.max_prompt_length, "
            "data.max_response_length or generation.max_new_tokens lower."
        )
    cache_gb(
        config, max_sequence_length=generated, max_requests=recipe.generation.max_requests,
        block_tokens=default_block_tokens(generated), kv_cache_gb=recipe.generation.kv_cache_gb,
    )


def _read_preferences(
    key: str, paths: Sequence[str], recipe: Recipe, tokenizer: Tokenizer, notes: list[str]
) -> list[Preference]:
    if not paths:
        return []
    preferences = load_preferences(
        paths, tokenizer, max_prompt_length=recipe.data.max_prompt_length,
        max_response_length=recipe.data.max_response_length, overlong=recipe.data.overlong,
    )
    if not preferences:
        raise UserError(f"{key}={', '.join(paths)} has no usable preference. Set {key} to files "
                        "that have some, or raise data.max_prompt_length and "
                        "data.max_response_length.")
    notes.append(f"{key}: {preferences.summary()}")
    return preferences


def check_vocabulary(tokenizer: Tokenizer, arch: Architecture) -> None:
    """Raise UserError if the tokenizer makes ids that the embedding does not have."""
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {arch.vocab_size}; token "
            "ids would fall outside the embedding. Set data.tokenizer to the model's own."
        )


def open_session(inputs: Inputs, topology: Topology, argv: list[str]) -> Session:
    """Build model, optimizer and generator; resume from the newest checkpoint if there is one.

    Collectives: every rank must call.
    """
    recipe, arch = inputs.recipe, inputs.architecture
    folder = RunFolder(Path(recipe.output_dir))
    progress = Progress(enabled=topology.is_main)
    checkpointer = Checkpointer(folder.checkpoints, topology, keep=recipe.checkpoint.keep)
    checkpointer.put_back()
    resume = checkpointer.latest()
    config = build_config(
        arch, recipe.parallel, precision=recipe.precision, overrides=recipe.model.overrides
    )
    chunks = build_chunks(config, arch, topology)
    if recipe.algorithm.name == "rft":
        reward = recipe.reward
        scale = 0.0 if reward.trunk == "detached" else reward.trunk_scale
        attach_reward_head(chunks, topology, trunk_scale=scale)
    if resume is None:
        load_hf_weights(
            chunks, arch, Path(recipe.model.hf), tp_rank=topology.tp_rank, tp_size=topology.tp_size
        )
    sharded = {"use_distributed_optimizer": shards_optimizer(recipe)}
    wrapped = wrap_data_parallel(chunks, config, topology, recipe.ddp | sharded)
    optimizer, scheduler = build_optimizer(recipe, config, wrapped, topology)
    state = RunState()
    if resume is not None:
        state = RunState.from_dict(checkpointer.load(resume, wrapped, optimizer, scheduler))
        progress.note(f"resuming at step {state.step}, round {state.round}")
    topology.barrier()  # what is wrong with the weights on any rank is known before anything is
    if topology.is_main:  # written
        folder.claim(recipe, inputs.data_digest, argv)
    bank = PairBank(folder.pairs, recipe.seed)
    heldout_bank = PairBank(folder.heldout, recipe.seed)
    previous_bank = PairBank(folder.previous, recipe.seed)
    if topology.is_main:
        for each in (bank, heldout_bank, previous_bank):
            each.discard_after(state.round)
        discard_ledger_after(folder.ledger, state.round)
    recorder = Recorder(folder, recipe, progress, state, is_main=topology.is_main)
    topology.barrier()
    return Session(
        recipe=recipe, topology=topology, folder=folder, tokenizer=inputs.tokenizer,
        demonstrations=inputs.demonstrations, heldout=inputs.heldout,
        preferences=inputs.preferences, heldout_preferences=inputs.heldout_preferences,
        architecture=arch, hf_config=inputs.hf_config, chunks=list(wrapped), optimizer=optimizer,
        scheduler=scheduler, checkpointer=checkpointer, bank=bank, heldout_bank=heldout_bank,
        previous_bank=previous_bank, recorder=recorder, progress=progress, state=state,
        multiple_of=packing_multiple(recipe, config),
        stepper=Stepper(
            wrapped, topology, optimizer=optimizer, chunk_size=recipe.train.logprob_chunk_size
        ),
        generator=MegatronGenerator(
            wrapped,
            topology,
            max_sequence_length=generation_length(recipe),
            vocab_size=arch.vocab_size,
            max_requests=recipe.generation.max_requests,
            kv_cache_gb=recipe.generation.kv_cache_gb,
        ),
    )


def generation_length(recipe: Recipe) -> int:
    """Longest prompt plus response that is generated, in tokens."""
    new_tokens = recipe.generation.max_new_tokens or recipe.data.max_response_length
    return recipe.data.max_prompt_length + new_tokens


def packing_multiple(recipe: Recipe, config: Any) -> int:
    """What the token count of a pack must be a multiple of under this layout and precision."""
    return alignment(
        recipe.parallel.tensor_model_parallel_size,
        recipe.parallel.sequence_parallel,
        recipe.parallel.context_parallel_size,
        config.fp8_recipe if config.fp8 else None,
    )


def is_finished(inputs: Inputs, topology: Topology) -> bool:
    """Whether the run was finished before; says so. Collective over every rank."""
    folder = RunFolder(Path(inputs.recipe.output_dir))
    finished = bool(from_main(folder.is_finished if topology.is_main else None, topology))
    if finished:
        Progress(enabled=topology.is_main).note(f"{folder.path} is finished; nothing to do.")
    return finished
