"""From inputs to a run: model, optimizer, generator, folder; resumed from a checkpoint if any."""

from pathlib import Path
from typing import Any

from megatron_irl.adapters.adapters import add_adapters
from megatron_irl.config import Recipe
from megatron_irl.console import Console
from megatron_irl.data.ledger import discard_ledger_after
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.evaluation.heldout import Evaluator
from megatron_irl.generation.graphs import why_not_captured
from megatron_irl.generation.interface import SamplingConfig
from megatron_irl.hardware.paged_attention import has_flash_attention
from megatron_irl.model.build import build_chunks, unwrap
from megatron_irl.model.kernels import Kernels, describe_kernels
from megatron_irl.model.specs import choose_spec
from megatron_irl.parallel.main_rank import everywhere, on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.policy.policy import Policy
from megatron_irl.run.adapter_rounds import restore_base
from megatron_irl.run.folder import RunFolder
from megatron_irl.run.inputs import Headers, Inputs, generation_length
from megatron_irl.run.prediction import Prediction
from megatron_irl.run.recorder import Recorder
from megatron_irl.run.run import Run
from megatron_irl.run.speed import Speedometer, known_machine
from megatron_irl.run.state import RunState
from megatron_irl.storage.checkpoint import Checkpointer
from megatron_irl.storage.lease import Lease
from megatron_irl.storage.shared_bank import SharedBank
from megatron_irl.timing import Clock
from megatron_irl.train.optimizer import build_optimizer
from megatron_irl.train.step import Trainer


def is_finished(folder: RunFolder, topology: Topology) -> bool:
    """Whether the run was finished before, as the main rank sees it. Collective."""
    return on_main(lambda: folder.is_finished, topology)


def open_run(inputs: Inputs, topology: Topology, argv: list[str], lease: Lease) -> Run:
    """Build every owner of a run; resume from the newest checkpoint if there is one.

    Args:
        argv: The command, for the record.
        lease: The run's hold on its folder, asked before everything that is committed there.

    Collectives: every rank must call.
    """
    recipe, folder = inputs.recipe, inputs.folder
    console = Console(enabled=topology.is_main)
    checkpointer, resume = open_checkpoints(inputs, topology, lease, console)
    # Made while weights are read, so that a warning comes before they are all there.
    prediction = predict(inputs, topology, console) if resume is None else None
    if resume is None or inputs.adapter:
        console.reading(Path(recipe.model.hf))
    if resume is not None:
        console.reading(folder.checkpoints / f"step_{resume:06d}")
    policy = build_policy(inputs, topology, weights=resume is None or bool(inputs.adapter))
    trainer = build_trainer(inputs, policy)
    state, saved = RunState(), {}
    if resume is not None:
        saved = checkpointer.load(resume, policy.chunks, trainer.optimizer, trainer.scheduler)
        state = RunState.from_dict(saved)
        restore_base(inputs, policy, state, saved)
        console.note(f"resuming at step {state.step}, round {state.round}")
    kernels = announce_kernels(policy, recipe, console)
    # What is wrong with the weights on any rank is known before anything is written.
    topology.barrier()
    on_main(lambda: folder.begin(recipe, inputs.identity, argv, kernels.as_dict()), topology)
    bank, heldout_bank, previous_bank = open_banks(inputs, state, topology, lease)
    clock = Clock(state.seconds, topology.heart)
    recorder = everywhere(lambda: Recorder(
        folder, recipe, inputs.algorithm, console, clock, state, is_main=topology.is_main,
        fence=lease.check, kept=saved.get("log"),
    ), topology)
    open_generator(policy, recipe)
    sampling = sampling_config(recipe, inputs.tokenizer)
    evaluator = Evaluator(
        recipe, inputs.algorithm, policy, inputs.tokenizer, inputs.data, sampling, heldout_bank,
        folder.preference_references, console, clock,
        on_main(lambda: folder.sampling, topology),  # not what each rank finds in run.json
    )
    return Run(
        recipe=recipe, algorithm=inputs.algorithm, topology=topology, policy=policy,
        trainer=trainer, data=inputs.data, bank=bank, previous_bank=previous_bank,
        evaluator=evaluator, folder=folder, checkpointer=checkpointer, state=state, clock=clock,
        recorder=recorder, console=console, sampling=sampling,
        companions=export_companions(inputs, topology),
        speedometer=Speedometer(inputs.architecture, topology, policy.chunks),
        prediction=prediction,
    )


def predict(inputs: Inputs, topology: Topology, console: Console) -> Prediction | None:
    """Have the planner say what the run should take, if this is the main rank of known GPUs."""
    if not topology.is_main or (machine := known_machine()) is None:
        return None
    try:
        return Prediction(
            inputs.recipe, machine.name, topology.world_size, inputs.data, console.warn
        )
    except OSError as error:  # no room in /tmp, no process: a plan only shows the run
        console.warn(f"there is no plan to compare the run with: {error}")
        return None


def open_generator(policy: Policy, recipe: Recipe) -> None:
    """Make the policy ready to generate as a resolved recipe has it."""
    options = recipe.generation
    policy.open_generator(
        max_sequence_length=generation_length(recipe), max_requests=options.max_requests,
        kv_cache_gb=options.kv_cache_gb, cuda_graphs=options.cuda_graphs,
        keep_cache=options.keep_cache, share_prompts=options.share_prompts,
        pipeline=options.pipeline,
    )


def open_checkpoints(
    inputs: Inputs, topology: Topology, lease: Lease, console: Console
) -> tuple[Checkpointer, int | None]:
    """The run's checkpoints, and the step of the newest intact one. Collective.

    Raises:
        UserError: There are some, and all of them are damaged.
    """
    options = inputs.recipe.checkpoint
    checkpointer = Checkpointer(
        inputs.folder.checkpoints, topology, keep=options.keep, keep_every=options.keep_every,
        asynchronous=options.asynchronous, verify=options.verify, fence=lease.check,
    )
    checkpointer.clean()
    newest = checkpointer.latest()
    for text in checkpointer.passed_over:
        console.warn(f"a checkpoint is passed over: {text}")
    return checkpointer, newest


def announce_kernels(policy: Policy, recipe: Recipe, console: Console) -> Kernels:
    """Say what this rank computes with, and warn of what is slow; the main rank's is shown."""
    model = unwrap(policy.chunks[0])
    layers = choose_spec(
        policy.config.params_dtype, policy.config.fp8, local_only=policy.architecture.local_only
    )
    off = "generation.cuda_graphs is off" if recipe.generation.cuda_graphs == "off" else None
    kernels = describe_kernels(
        model, layers=layers, not_captured=off or why_not_captured([model], has_flash_attention())
    )
    console.note(kernels.line())
    for text in kernels.warnings():
        console.warn(text)
    return kernels


def build_policy(headers: Headers, topology: Topology, *, weights: bool) -> Policy:
    """The policy with the algorithm's heads, ready for an optimizer. Collective.

    Args:
        headers: Of a resolved recipe, as ``Inputs`` are.
        weights: Read the starting model's; else they are unset, for a checkpoint to fill. One
            with adapters has no others.
    """
    recipe, arch = headers.recipe, headers.architecture
    chunks = build_chunks(headers.model_config, arch, topology)
    # In this order: adapters freeze what is there, a reward head is trained all the same, and DDP
    # makes buffers of the parameters that it finds.
    adapters = None
    if headers.adapter is not None:
        adapters = add_adapters(chunks, headers.adapter, arch, topology)
    headers.algorithm.attach_heads(recipe, chunks, topology)
    policy = Policy(
        chunks, topology, arch, rows_at_once=recipe.train.logprob_rows,
        adapters=adapters, samples_merged=recipe.adapter.generation == "merged",
        share_prompts=recipe.train.share_prompts,
    )
    if weights:
        policy.load_weights(Path(recipe.model.hf))
    return policy.for_training(headers.ddp_config)


def build_trainer(headers: Headers, policy: Policy) -> Trainer:
    """The optimizer over the policy, and its schedule. Collective."""
    recipe = headers.recipe
    optimizer = build_optimizer(
        headers.optimizer_config, policy.chunks, policy.topology,
        head_lr=headers.algorithm.head_lr(recipe), min_lr_ratio=recipe.schedule.min_lr_ratio,
    )
    return Trainer(recipe, policy, optimizer)


def open_banks(
    inputs: Inputs, state: RunState, topology: Topology, lease: Lease
) -> tuple[SharedBank, SharedBank, SharedBank]:
    """The run's pairs, the held-out ones and those of earlier rounds, back to where it stands.

    Collectives: every rank must call.
    """
    folder, recipe = inputs.folder, inputs.recipe
    # Whether a run that goes on within a round cannot do without the bank's part of it.
    algorithm = inputs.algorithm
    draws, previous = algorithm.draws_samples, algorithm.uses_previous_pairs(recipe)
    required = {
        folder.pairs: draws, folder.heldout: False,
        folder.previous: previous and state.round > 0,
    }
    banks = []
    for path, is_required in required.items():
        bank = SharedBank(path, recipe.seed, topology, lease.check)
        bank.open(state.round, inside=state.step_in_round > 0, required=is_required)
        banks.append(bank)
    on_main(lambda: discard_ledger_after(folder.ledger, state.round), topology)
    return banks[0], banks[1], banks[2]


def sampling_config(recipe: Recipe, tokenizer: Tokenizer) -> SamplingConfig:
    """How a resolved recipe draws samples; the seed is the run's, for others to derive from."""
    options = recipe.generation
    assert options.max_new_tokens is not None, "the recipe must be resolved"
    return SamplingConfig(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
        max_new_tokens=options.max_new_tokens, seed=recipe.seed, eos_id=tokenizer.eos_id,
        stop_ids=tokenizer.stop_ids,
    )


def export_companions(inputs: Inputs, topology: Topology) -> dict[str, Any]:
    """The keywords of ``export_hf`` that are the same for everything a run exports."""
    data = inputs.recipe.data
    return {
        "hf_config": inputs.hf_config, "source_dir": Path(inputs.recipe.model.hf),
        "topology": topology,
        "tokenizer_path": Path(data.tokenizer) if data.tokenizer else None,
        "chat_template": inputs.tokenizer.chat_template if data.chat_template else None,
        "stop_ids": inputs.tokenizer.stop_ids,
    }
