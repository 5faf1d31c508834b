"""``score``, and a model opened for inference from an HF folder or a run folder."""

import argparse
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from megatron_irl import hardware
from megatron_irl.algorithms.registry import rules_of
from megatron_irl.algorithms.rules import RewardKind
from megatron_irl.cli.adapted import load_adapted
from megatron_irl.cli.encoding import scored_sequences
from megatron_irl.cli.outputs import check_out, reading_of, say_what_was_read, write_records
from megatron_irl.cli.ranks import adopt_environment, run_ranks
from megatron_irl.config import ParallelConfig, Recipe, hub_snapshot, load_recipe
from megatron_irl.config.run_files import CHECKPOINTS, HF, HF_REWARD, RECIPE
from megatron_irl.console import Console
from megatron_irl.convert.hf_config import Architecture, architecture, read_hf_config
from megatron_irl.convert.hf_folder import validate_hf_folder
from megatron_irl.convert.peft_folder import is_adapter, model_folder
from megatron_irl.convert.reward_folder import read_reward_head
from megatron_irl.data.prompts import ScoreRecord, load_score_records
from megatron_irl.data.sources import Reading
from megatron_irl.data.tokenizer import Tokenizer, fitted, load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.model.build import build_chunks, build_config
from megatron_irl.model.reward_head import attach_reward_head, reward_head
from megatron_irl.objectives.irft import implicit_rewards
from megatron_irl.parallel.topology import Topology, initialize, shutdown
from megatron_irl.policy.policy import Policy
from megatron_irl.policy.provenance import check_weights, date_of, start_of
from megatron_irl.policy.scoring import rounded
from megatron_irl.storage.checkpoint import Checkpointer


@dataclass(frozen=True)
class Source:
    """Where a model comes from: an HF folder, or a run (its result or its newest checkpoint).

    In the place of an HF folder there may be an adapter of peft, which is merged into its base, or
    for ``score`` a reward model, which is its own ``hf_reward``.
    """

    hf_dir: Path
    tokenizer_dir: Path
    chat_template: str | None = None
    checkpoints: Path | None = None
    recipe: Recipe | None = None
    hf_reward: Path | None = None

    @property
    def reward(self) -> RewardKind:
        """Where its reward is; an HF folder of a language model carries none."""
        if self.recipe is None:
            return "none" if self.hf_reward is None else "explicit"
        return rules_of(self.recipe.algorithm.name).reward

    @property
    def length_normalize(self) -> bool:
        """Whether its implicit reward is one per token; an HF folder by itself does not say."""
        return self.recipe is not None and self.recipe.algorithm.length_normalize


@dataclass
class OpenModel:
    """A model ready for inference on this rank.

    ``weights`` names what was loaded: a checkpoint's step, or the state of the HF folder's files.
    """

    source: Source
    policy: Policy
    tokenizer: Tokenizer
    precision: str
    weights: str

    @property
    def topology(self) -> Topology:
        return self.policy.topology

    @property
    def architecture(self) -> Architecture:
        return self.policy.architecture


def find_source(folder: Path, *, reward_model: bool = False) -> Source:
    """Tell an HF folder from a run folder.

    Args:
        reward_model: Whether a model with a reward head alone will do.

    Raises:
        UserError: It is neither, or a run that has no weights yet.
    """
    folder = hub_snapshot(folder)
    if (folder / RECIPE).exists():
        recipe = load_recipe(folder / RECIPE, check_files=False)  # the data may be gone
        tokenizer = Path(recipe.data.tokenizer or recipe.model.hf)
        template = recipe.data.chat_template
        if (folder / HF).is_dir():  # whole, with tokenizer and template
            return Source(folder / HF, folder / HF, None, None, recipe, folder / HF_REWARD)
        if any((folder / CHECKPOINTS).glob("step_*")):
            return Source(
                Path(recipe.model.hf), tokenizer, template, folder / CHECKPOINTS, recipe
            )
        raise UserError(f"--model {folder} is a run without hf/ or a checkpoint yet. Let it run.")
    if is_adapter(folder):
        return Source(folder, model_folder(folder))
    if not (folder / "config.json").exists():
        if (folder / ".metadata").exists():
            raise UserError(
                f"--model {folder} is a checkpoint. Give the run folder it belongs to, or the HF "
                "folder that tools/convert_megatron_to_hf.py --checkpoint makes of it."
            )
        raise UserError(
            f"--model {folder} is neither an HF folder (config.json), nor an adapter of peft "
            f"(adapter_config.json), nor a run folder ({RECIPE}). Give one of these."
        )
    if "ForSequenceClassification" in str(read_hf_config(folder).get("architectures")):
        if not reward_model:
            raise UserError(
                f"--model {folder} is a reward model without a language-model head. Give it to "
                "score, or give the run folder it came from."
            )
        return Source(folder, folder, hf_reward=folder)
    return Source(folder, folder)


def open_model(options: argparse.Namespace, *, with_reward_head: bool = False) -> OpenModel:
    """Build the model on this rank and load its weights. Collective over every rank."""
    source = find_source(options.model, reward_model=with_reward_head)
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        data_parallel_size=options.data_parallel_size,
    )
    hf_config = read_hf_config(model_folder(source.hf_dir))
    arch = architecture(hf_config, reward_model=with_reward_head)
    default = source.recipe.precision if source.recipe else "bf16" if hardware.IS_CUDA else "fp32"
    if default == "fp8":
        default = "bf16"  # the parameters' type; 8-bit products want padded packs and gain little
    precision = options.precision or default
    overrides = source.recipe.model.overrides if source.recipe else {}
    if precision != "fp8":
        overrides = {k: v for k, v in overrides.items() if not k.startswith("fp8")}
    config = build_config(arch, parallel, precision=precision, overrides=overrides)
    validate_hf_folder(source.hf_dir, arch)
    template = options.chat_template or source.chat_template
    recipe = source.recipe
    tokenizer = load_tokenizer(
        source.tokenizer_dir, template, model=model_folder(source.hf_dir),
        arguments=recipe.data.chat_template_args if recipe else None,
        date=date_of(start_of(options.model)) if recipe else None,
    )
    tokenizer = fitted(tokenizer, arch.vocab_size)
    topology = initialize(parallel)
    chunks = build_chunks(config, arch, topology)
    if with_reward_head:
        attach_reward_head(chunks, topology)
    policy = Policy(
        chunks, topology, arch, share_prompts=recipe.train.share_prompts if recipe else True)
    model = OpenModel(source, policy, tokenizer, precision, weights="")
    console = Console(enabled=topology.is_main)
    if source.checkpoints is None:
        console.reading(model_folder(source.hf_dir))
        policy.load_weights(source.hf_dir)
        model.weights = _state_of_files(source.hf_dir)
        if with_reward_head and source.hf_reward is not None:
            _load_reward_head(policy, source.hf_reward)
    else:
        checkpointer = Checkpointer(source.checkpoints, topology, keep=1)
        step = checkpointer.latest()
        assert step is not None
        console.reading(source.checkpoints / f"step_{step:06d}")
        if recipe is not None and recipe.adapter.enabled:
            load_adapted(policy, options.model, recipe, parallel, checkpointer, step)
        else:
            checkpointer.load(step, chunks)
        model.weights = f"step {step}"
    return model


def _state_of_files(hf_dir: Path) -> str:
    """A digest that changes when the weights are written again; their bytes are not read."""
    digest = hashlib.sha256()
    for path in sorted(hf_dir.glob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return f"files {digest.hexdigest()[:16]}"


def _load_reward_head(policy: Policy, hf_reward: Path) -> None:
    weight = read_reward_head(hf_reward)
    head = reward_head(policy.chunks)
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(weight)


def run_score(options: argparse.Namespace, argv: list[str]) -> int:
    """``megatron-irl score``: the reward of every response.

    Explicit for a run that learns a reward head, and for a reward model; beta * (log pi -
    log pi_ref) otherwise, per token for a run that trained so (``algorithm.length_normalize``).
    """
    check_out(options.out, options.overwrite)
    reading = reading_of(options, "--pairs", options.pairs)
    records = load_score_records(reading)
    source = find_source(options.model, reward_model=True)
    if source.reward == "explicit":
        _check_explicit(options, source)
        return with_ranks(options, argv, lambda: _score_explicit(options, reading, records))
    reference, beta = reward_terms(options, source)
    reference = hub_snapshot(reference)
    if not is_adapter(reference) and not (reference / "config.json").exists():
        refuse_reference(options, reference)
    return with_ranks(options, argv, lambda: _score(options, reading, records, reference, beta))


def with_ranks(
    options: argparse.Namespace, argv: list[str], run: Callable[[], None]
) -> int:
    sizes = (
        options.tensor_model_parallel_size, options.pipeline_model_parallel_size,
        options.data_parallel_size,
    )
    if min(sizes) < 1:
        raise UserError("parallel sizes must be at least 1.")
    if adopt_environment() is None and math.prod(sizes) > 1:
        return run_ranks(argv, math.prod(sizes))
    run()
    shutdown()
    return 0


def reward_terms(options: argparse.Namespace, source: Source) -> tuple[Path, float]:
    """The reference policy of an implicit reward, and its beta; UserError if there is none."""
    recipe = source.recipe
    if recipe is not None and source.reward == "implicit":
        base = Path(recipe.model.hf)
        reference = options.reference or Path(recipe.adapter.path or base)
        if options.reference is None and (base / "config.json").exists():
            check_weights(options.model, base)
        return reference, options.beta if options.beta is not None else recipe.algorithm.beta[-1]
    if options.reference is None:
        what = "an HF folder" if recipe is None else f"an {recipe.algorithm.name} run"
        raise UserError(
            f"--model {options.model} is {what} and carries no reward; an implicit reward needs a "
            "reference policy. Give a run of irft or spin, or set --reference to an HF folder."
        )
    return options.reference, options.beta if options.beta is not None else 1.0


def refuse_reference(options: argparse.Namespace, reference: Path) -> NoReturn:
    """Say that there is no reference policy in a folder."""
    if options.reference is not None:
        raise UserError(f"--reference {reference} is not an HF folder; it has no config.json.")
    recipe = options.model / RECIPE
    there = "has no config.json" if reference.is_dir() else "does not exist"
    raise UserError(f"model.hf={reference} in {recipe}, the reference policy of the run, {there}; "
                    f"the working directory is {Path.cwd()}. Start the command where the run was "
                    "started, or give the folder as --reference.")


def _check_explicit(options: argparse.Namespace, source: Source) -> None:
    for name in ("reference", "beta"):
        if getattr(options, name) is not None:
            what, other = "a reward model", ""
            if source.recipe is not None:
                what = "a run whose reward is explicit"
                other = f", or give {options.model}/hf as --model for an implicit reward"
            raise UserError(f"--{name} {getattr(options, name)} conflicts with --model "
                            f"{options.model}, {what}. Remove --{name}{other}.")
    if source.hf_reward is not None and not source.hf_reward.is_dir():
        raise UserError(
            f"{source.hf_reward} does not exist; the run's reward head was in it. Restore it."
        )


def _score_explicit(
    options: argparse.Namespace, reading: Reading, records: list[ScoreRecord]
) -> None:
    model = open_model(options, with_reward_head=True)
    progress = Console(enabled=model.topology.is_main)
    say_what_was_read(progress, reading, model.tokenizer, records)
    sequences = scored_sequences(
        model.tokenizer, records, max_length=model.architecture.max_sequence_length)
    rewards = model.policy.score_rewards(sequences)
    _write_rewards(options, progress, records, rewards)


def _score(
    options: argparse.Namespace, reading: Reading, records: list[ScoreRecord], reference: Path,
    beta: float,
) -> None:
    model = open_model(options)
    progress = Console(enabled=model.topology.is_main)
    say_what_was_read(progress, reading, model.tokenizer, records)
    check_reference(reference, model.architecture)
    sequences = scored_sequences(
        model.tokenizer, records, max_length=model.architecture.max_sequence_length)
    policy = model.policy
    logps = np.array(rounded(policy.score_sums(sequences).logp))
    progress.reading(model_folder(reference))
    policy.load_weights(reference)
    rewards = implicit_rewards(
        logps, np.array(rounded(policy.score_sums(sequences).logp)),
        np.array([len(response) for _, response in sequences]), beta=beta,
        length_normalize=model.source.length_normalize,
    )
    _write_rewards(options, progress, records, rewards.tolist())


def _write_rewards(
    options: argparse.Namespace, progress: Console, records: list[ScoreRecord],
    rewards: list[float],
) -> None:
    if progress.enabled:
        left = iter(rewards)
        write_records(options.out, (
            record.record | {"rewards": [next(left) for _ in record.responses]}
            for record in records
        ))
        progress.note(f"wrote rewards of {len(rewards)} responses to {options.out}")


def check_reference(reference: Path, arch: Architecture, flag: str = "--reference") -> None:
    """Raise UserError unless a folder has other weights of the same model."""
    other = architecture(read_hf_config(model_folder(reference)))
    if (other.transformer, other.vocab_size) != (arch.transformer, arch.vocab_size):
        raise UserError(
            f"{flag} {reference} has another architecture than --model; both must be the "
            "same model with other weights. Give the model the run started from."
        )
    validate_hf_folder(reference, arch)
