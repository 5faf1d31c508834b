"""``megatron-irl plan``: check a recipe, and say what it takes before it runs."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_irl.config import Recipe, check_layout, load_recipe, resolve
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.hf_folder import validate_hf_folder
from megatron_irl.data.demonstrations import Limits
from megatron_irl.data.inspection import describe_lengths, show_records
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.planning.certain import active_parameters, parameters_of
from megatron_irl.planning.data_lengths import is_small, lengths_of, sample_lengths
from megatron_irl.planning.fuller import fuller_microbatches
from megatron_irl.planning.machines import machine_named
from megatron_irl.planning.plan import Plan, make_plan
from megatron_irl.planning.report import (
    draw_plan,
    fuller_line,
    plan_json,
    plan_lines,
    search_lines,
)
from megatron_irl.planning.search import Found, layouts_that_fit
from megatron_irl.planning.workload import Lengths
from megatron_irl.run.inputs import Headers, Inputs, read_headers, read_inputs

DOES_NOT_FIT = 2
WITHOUT_DATA = 10_000  # records, where the recipe's data are not looked at


@dataclass(frozen=True)
class Planned:
    """What ``plan`` has to say."""

    text: str
    code: int


def run_plan(options: argparse.Namespace) -> Planned:
    """Check what ``train`` checks, and plan.

    Not checked is whether this machine can run it: a plan is made on a login node too.

    Raises:
        UserError: As ``train`` would, for what can be known without reading all of the data.
    """
    machine = machine_named(options.gpu)
    lengths = None if options.lengths is None else _given_lengths(options.lengths)
    recipe = load_recipe(options.recipe, options.overrides, check_files=lengths is None)
    dp_size = check_layout(recipe, options.world_size)
    recipe = _with_data_parallel_size(recipe, dp_size)
    known = _read(recipe, lengths, shows=options.show is not None)
    plan = make_plan(
        known.recipe, known.arch, machine, known.lengths, data_parallel_size=dp_size
    )
    found: list[Found] = []
    if options.search or not plan.fits:
        found = layouts_that_fit(known.recipe, known.arch, machine, known.lengths,
                                 world_size=plan.setup.world_size)
    if options.picture is not None:
        draw_plan(plan, options.picture)
    code = 0 if plan.fits else DOES_NOT_FIT
    fuller = fuller_microbatches(plan) if plan.fits else None
    if options.json:
        return Planned(json.dumps(plan_json(plan, found, fuller)) + "\n", code)
    lines = [*known.notes, *_work(known), *_layout(plan), *plan_lines(plan)]
    if fuller is not None:
        lines.append(fuller_line(plan, fuller))
    if options.search or not plan.fits:
        lines += search_lines(found, plan.setup.world_size)
    if recipe.precision == "fp8":
        lines.append("the hardware was not checked: precision=fp8 needs GPUs of compute capability "
                     "8.9 or newer (Blackwell for mxfp8) and Transformer Engine")
    if options.show is not None and known.inputs is not None:
        lines += _demonstrations(known.inputs, options.show)
    return Planned("\n".join(lines) + "\n", code)


@dataclass(frozen=True)
class _Known:
    """What was read of a recipe; ``inputs`` where all of its data were."""

    recipe: Recipe
    arch: Architecture
    lengths: Lengths
    notes: list[str]
    algorithm: Any
    lr: float
    inputs: Inputs | None = None


def _read(recipe: Recipe, lengths: Lengths | None, *, shows: bool) -> _Known:
    if lengths is None and (shows or is_small(recipe)):
        inputs = read_inputs(recipe, check_hardware=False, keeps_tokens=False)
        return _Known(inputs.recipe, inputs.architecture, lengths_of(inputs.data.demonstrations),
                      inputs.notes, inputs.algorithm, _lr(inputs), inputs)
    headers = read_headers(recipe, check_hardware=False)
    notes, hf_dir = [], Path(recipe.model.hf)
    if lengths is None or any(hf_dir.glob("*.safetensors")):
        validate_hf_folder(hf_dir, headers.architecture)
    else:
        notes.append(f"{hf_dir} has no weights: planned from its config.json alone")
    if lengths is None:
        tokenizer = load_tokenizer(
            recipe.data.tokenizer or hf_dir, recipe.data.chat_template, model=hf_dir,
            arguments=recipe.data.chat_template_args,
        )
        lengths = sample_lengths(recipe, tokenizer)
    resolved = resolve(recipe, lengths.records)
    return _Known(
        resolved, headers.architecture, lengths, notes, headers.algorithm, _lr(headers)
    )


def _lr(of: Headers) -> float:
    return of.optimizer_config.lr or 0.0


def _given_lengths(text: str) -> Lengths:
    """Of ``PROMPT,RESPONSE`` or ``PROMPT,RESPONSE,RECORDS``."""
    numbers = text.split(",")
    if len(numbers) not in (2, 3) or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise UserError(f"--lengths {text} is not PROMPT,RESPONSE or PROMPT,RESPONSE,RECORDS: mean "
                        "tokens and a number of demonstrations, as in 400,300,20000.")
    prompt, response, *records = map(int, numbers)
    return Lengths.equal(prompt, response, records[0] if records else WITHOUT_DATA,
                         f"prompts of {prompt} and responses of {response} tokens, as given")


def _with_data_parallel_size(recipe: Recipe, size: int) -> Recipe:
    parallel = dataclasses.replace(recipe.parallel, data_parallel_size=size)
    return dataclasses.replace(recipe, parallel=parallel)


def _demonstrations(inputs: Inputs, show: int) -> list[str]:
    options, data = inputs.recipe.data, inputs.data
    limits = Limits(options.max_prompt_length, options.max_response_length, options.overlong)
    return [
        *show_records(data.demonstrations, inputs.tokenizer, show),
        *describe_lengths(data.report, limits, data.demonstrations,
                          inputs.architecture.max_sequence_length),
    ]


def _work(known: _Known) -> list[str]:
    recipe, rules, records = known.recipe, known.algorithm, known.lengths.records
    algorithm = recipe.algorithm
    lines = [
        f"{algorithm.name}: {algorithm.rounds} rounds of {rules.describe_steps(recipe)}, "
        f"{records} demonstrations"
    ]
    if rules.draws_samples:
        prompts = algorithm.prompts_per_round or 0
        samples = rules.samples_per_prompt(recipe)
        times = f" {samples} times" if samples > 1 else ""
        lines.append(
            f"each round samples {prompts} prompts{times}, up to "
            f"{recipe.generation.max_new_tokens} new tokens each, in "
            f"{-(-prompts // recipe.generation.part_size)} committed parts"
        )
        passes = algorithm.rounds * prompts / records
    else:
        steps = algorithm.rounds * (algorithm.steps_per_round or 0)
        passes = steps * recipe.train.global_batch_size / records
    head_lr, schedule = rules.head_lr(recipe), recipe.schedule
    head = "" if head_lr is None else f", of the reward head {head_lr:g} (reward.lr)"
    return [*lines, f"{passes:.2f} passes over the demonstrations",
            f"learning rate {known.lr:g} (optimizer.lr){head}; warmup over "
            f"{schedule.lr_warmup_fraction:.0%} of the steps, then {schedule.lr_decay_style}"]


def _layout(plan: Plan) -> list[str]:
    setup, arch = plan.setup, plan.setup.arch
    active, experts = "", ""
    if arch.dims["experts"]:
        active = (f", {active_parameters(arch) / 1e9:.3f} B of them active ({setup.chosen} of "
                  f"{arch.dims['experts']} experts a token)")
        if setup.tp > 1:
            experts = "; experts whole" if setup.ep > 1 else "; experts in slices"
    return [
        f"{parameters_of(arch) / 1e9:.3f} B parameters{active}; tensor {setup.tp} x pipeline "
        f"{setup.pp} x data {setup.dp} = {setup.world_size} ranks{experts}; "
        f"{setup.recipe.precision}; no reference model"
    ]
