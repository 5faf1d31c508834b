"""What an ``evaluate`` command asks for, checked before anything heavy is opened."""

import argparse
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_irl.cli.inference import Source, find_source, refuse_reference, reward_terms
from megatron_irl.cli.outputs import check_out, reading_of
from megatron_irl.config import hub_snapshot
from megatron_irl.config.files import files_of
from megatron_irl.config.run_files import EVALUATION, RECIPE
from megatron_irl.convert.peft_folder import is_adapter, model_folder
from megatron_irl.data.prompts import PromptRecord, load_prompts
from megatron_irl.data.sources import Reading
from megatron_irl.data.tokenizer import Tokenizer, load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.evaluation.bias import StereotypePair, load_stereotypes
from megatron_irl.evaluation.harness import TaskOptions, require_lm_eval
from megatron_irl.evaluation.texts import render_chat
from megatron_irl.evaluation.toxicity import Scorer, load_scorer
from megatron_irl.policy.provenance import check_weights

PROMPT_SETS = ("harmful", "harmless", "toxicity_prompts")
ASKED = ("tasks", *PROMPT_SETS, "stereotypes", "preferences")


@dataclass(frozen=True)
class EvaluationPlan:
    """A checked command.

    Attributes:
        source: The model.
        before: HF folder of the weights to compare with; None: none.
        out: File of the results.
        tasks: None where none is asked for.
        prompts: Of each prompt set asked for, by the name of its option.
        stereotypes: Pairs, possibly none.
        preferences: How they are read; None: none.
        reference, beta: Of an implicit reward; None where it is explicit or not asked for.
        scorer: Of toxicity.
        max_new_tokens: Of an answer to a prompt of a set.
        settings: All that the numbers depend on beside weights and files' contents, as JSON.
    """

    source: Source
    before: Path | None
    out: Path
    tasks: TaskOptions | None
    prompts: dict[str, list[PromptRecord]]
    stereotypes: list[StereotypePair]
    preferences: Reading | None
    reference: Path | None
    beta: float
    scorer: Scorer | None
    max_new_tokens: int
    settings: dict[str, Any]


def evaluation_plan(options: argparse.Namespace) -> EvaluationPlan:
    """Check a command.

    Raises:
        UserError: Nothing is asked for, a file or a folder is not there, options conflict.
    """
    if not any(getattr(options, name) for name in ASKED):
        raise UserError("nothing to evaluate: give " + ", ".join(
            f"--{name.replace('_', '-')}" for name in ASKED[:-1]) + f" or --{ASKED[-1]}.")
    _check_options(options)
    source = find_source(options.model)
    tasks = _task_options(options)
    reference, beta = _reward(options, source)
    before = _before(options, source)
    settings = _settings(options, before)
    plan = EvaluationPlan(
        source=source, before=before, out=_out(options, settings), tasks=tasks,
        prompts={name: _prompts(options, name) for name in PROMPT_SETS if getattr(options, name)},
        stereotypes=load_stereotypes(_one_file(options, "stereotypes"))
        if options.stereotypes else [],
        preferences=reading_of(options, "--preferences", options.preferences)
        if options.preferences else None,
        reference=reference, beta=beta,
        scorer=load_scorer(options.toxicity) if options.toxicity else None,
        max_new_tokens=options.max_new_tokens, settings=settings)
    if options.apply_chat_template:
        _check_template(options, source)
    return plan


def _check_options(options: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot {options.num_fewshot} must be at least 0.")
    for name in ("fewshot_as_multiturn", "system"):
        if getattr(options, name) and not options.apply_chat_template:
            raise UserError(f"--{name.replace('_', '-')} needs --apply-chat-template: without it "
                            "there are no turns.")
    if bool(options.toxicity) != bool(options.toxicity_prompts):
        given, missing = ("--toxicity", "--toxicity-prompts") if options.toxicity else (
            "--toxicity-prompts", "--toxicity")
        raise UserError(f"{given} needs {missing} too: a scorer and prompts whose answers it "
                        "scores.")
    if options.toxicity == "" or options.tasks == "":
        raise UserError("--tasks and --toxicity must not be empty.")


def _task_options(options: argparse.Namespace) -> TaskOptions | None:
    if not options.tasks:
        for name in ("include_path", "num_fewshot", "limit", "gen_kwargs", "log_samples"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is about --tasks, and none is given.")
        return None
    require_lm_eval()
    if options.include_path is not None and not options.include_path.is_dir():
        raise UserError(f"--include-path {options.include_path} is not a folder.")
    names = tuple(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks {options.tasks!r} names no task.")
    tasks = TaskOptions(
        names, options.include_path, options.num_fewshot, options.limit, options.gen_kwargs,
        options.apply_chat_template, options.fewshot_as_multiturn, options.system)
    fixed = [choice.name for choice in tasks.choices() if choice.metric is not None]
    if fixed and options.num_fewshot is not None:
        raise UserError(f"--num-fewshot {options.num_fewshot} conflicts with --tasks "
                        f"{options.tasks}, a set with shots of its own. Name the tasks instead: "
                        f"--tasks {','.join(fixed)}.")
    return tasks


def _one_file(options: argparse.Namespace, name: str) -> Path:
    found = files_of(f"--{name}", str(getattr(options, name)))
    if len(found) > 1:
        raise UserError(f"--{name} {getattr(options, name)} is {len(found)} files; give one.")
    return Path(found[0])


def _prompts(options: argparse.Namespace, name: str) -> list[PromptRecord]:
    flag = f"--{name.replace('_', '-')}"
    records = load_prompts(reading_of(options, flag, getattr(options, name)))
    if not options.apply_chat_template:
        return records
    records = [replace(r, conversation=replace(r.conversation, plain=False)) for r in records]
    return records if options.system is None else [r.with_system(options.system) for r in records]


def _reward(options: argparse.Namespace, source: Source) -> tuple[Path | None, float]:
    """Reference and beta of an implicit reward; (None, 1) where there is none."""
    if not options.preferences:
        for name in ("reference", "beta"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is about the reward on --preferences, and none is "
                                "given.")
        return None, 1.0
    if source.reward == "explicit":
        for name in ("reference", "beta"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} conflicts with --model {options.model}, a run whose "
                                f"reward is explicit. Remove --{name}.")
        return None, 1.0
    reference, beta = reward_terms(options, source)
    reference = hub_snapshot(reference)
    if not is_adapter(reference) and not (reference / "config.json").exists():
        refuse_reference(options, reference)
    return reference, beta


def _before(options: argparse.Namespace, source: Source) -> Path | None:
    """The weights to compare with: those the run began with, or as ``--before`` says."""
    if options.before == "none" or (options.before is None and source.recipe is None):
        return None
    recipe = source.recipe
    if options.before is not None:
        folder = hub_snapshot(Path(options.before).expanduser())
    else:
        assert recipe is not None
        folder = hub_snapshot(Path(recipe.adapter.path or recipe.model.hf))
    if not is_adapter(folder) and not (folder / "config.json").exists():
        what = f"--before {folder}" if options.before else f"{folder}, which the run started from,"
        raise UserError(f"{what} is not an HF folder here; it has no config.json. Give the folder "
                        "as --before, or --before none to look at the result alone.")
    if options.before is None and recipe is not None and (
            Path(recipe.model.hf) / "config.json").exists():
        check_weights(options.model, Path(recipe.model.hf))
    return folder


def _settings(options: argparse.Namespace, before: Path | None) -> dict[str, Any]:
    names = ("tasks", "include_path", "num_fewshot", "limit", "gen_kwargs", "fewshot_as_multiturn",
             *PROMPT_SETS, "stereotypes", "toxicity", "preferences", "beta", "max_new_tokens",
             "apply_chat_template", "system", "chat_template", "precision")
    chosen = {name: getattr(options, name) for name in names}
    said = {name: str(v) if isinstance(v, Path) else v for name, v in chosen.items() if v}
    return said | ({"before": str(before)} if before is not None else {})


def _out(options: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """``--out``, or a name in the run folder that follows from what is asked."""
    if options.out is not None:
        check_out(options.out, options.overwrite)
        return options.out
    if not (options.model / RECIPE).exists():
        raise UserError(f"--model {options.model} is not a run folder; say with --out where the "
                        "results go.")
    said = [options.tasks or "", *(name for name in ASKED[1:] if getattr(options, name))]
    name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, said)).replace("_", "-"))[:40].strip("-")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return options.model / EVALUATION / f"{name}-{digest}.json"


def _check_template(options: argparse.Namespace, source: Source) -> None:
    """Raise UserError unless the template renders what the tasks will have."""
    tokenizer: Tokenizer = load_tokenizer(
        source.tokenizer_dir, options.chat_template or source.chat_template,
        model=model_folder(source.hf_dir))
    if tokenizer.template is None:
        raise UserError(f"--apply-chat-template: the tokenizer of {options.model} has no chat "
                        "template. Set --chat-template to a Jinja file, or remove the option.")
    turns = [{"role": "user", "content": "question"}]
    if options.fewshot_as_multiturn:
        turns += [{"role": "assistant", "content": "answer"}, *turns]
    if options.system is not None:
        turns = [{"role": "system", "content": options.system}, *turns]
        if options.system.strip() not in render_chat(tokenizer, turns):
            raise UserError("--system: the chat template leaves a system turn out. Put the text "
                            "into the prompts, or set --chat-template to one that knows it.")
    render_chat(tokenizer, turns)
