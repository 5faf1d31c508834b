"""``megatron-irl benchmark``: phases of a recipe timed on this machine, with or without a peer."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_irl.bench.baseline import falls, read_baseline
from megatron_irl.bench.peer import Peer
from megatron_irl.bench.phases import Bench, phases_of
from megatron_irl.bench.work import Case, parse_lengths
from megatron_irl.cli.ranks import adopt_environment, run_ranks
from megatron_irl.config import Recipe, check_layout, load_recipe, resolve
from megatron_irl.errors import UserError
from megatron_irl.parallel.topology import initialize, shutdown
from megatron_irl.run.inputs import Headers, read_headers

COLUMNS = ("tokens_per_second", "seconds", "prefill_seconds", "decode_step_seconds",
           "train/tflops", "train/mfu", "bandwidth_utilisation", "decode_bandwidth_utilisation",
           "ragged_to_equal", "host_share", "ragged_host_share", "graphs",
           "memory/peak_allocated", "memory/peak_process", "memory/peak_added", "ratio",
           "memory_ratio")


def run_benchmark(options: argparse.Namespace, argv: list[str]) -> int:
    """Time the phases; the last line is JSON of all results. Returns the exit code."""
    _check(options)
    baseline = read_baseline(options.baseline) if options.baseline else []
    if not options.role and (options.sweep or options.peer):
        _finish(options, _several(options, argv), baseline)
        return 0
    recipe = recipe_of(options)
    world_size = adopt_environment()
    size = recipe.parallel.model_parallel_size * recipe.parallel.data_parallel_size
    if world_size is None and size > 1 and options.role != "peer":
        return run_ranks(argv, size)
    check_layout(recipe, world_size)
    case, headers = case_of(options, recipe)
    topology = initialize(recipe.parallel, seed=recipe.seed)
    timed: Bench | Peer
    if options.role == "peer":
        timed = _peer(options.peer)(case, random_weights=options.random_weights)
    else:
        timed = Bench(case, headers, topology, random_weights=options.random_weights)
    results = []
    for phase in phases_of(options.phase):
        if phase == "save" and options.role == "peer":
            continue
        results.append(timed.run(phase) | {"case": case_name(case, headers, phase)})
        if topology.is_main and not options.role:
            sys.stdout.write(_row(results[-1]) + "\n")
            sys.stdout.flush()
    if topology.is_main:
        _finish(options, results, baseline)
    shutdown()
    return 0


def recipe_of(options: argparse.Namespace, more: Sequence[str] = ()) -> Recipe:
    """The recipe with its overrides and ``more`` of them, for prompts and responses as asked."""
    prompt, response = parse_lengths(options.lengths)
    return load_recipe(options.recipe, [
        f"data.max_prompt_length={prompt.high}", f"data.max_response_length={response.high}",
        *options.overrides, *more,
    ], check_files=False)


def case_of(
    options: argparse.Namespace, recipe: Recipe, *, check_hardware: bool = True
) -> tuple[Case, Headers]:
    """What is timed, and what the model is."""
    case = Case(resolve(recipe, 1_000_000), *parse_lengths(options.lengths), options.requests,
                options.steps, options.warmup, options.ragged)
    return case, read_headers(recipe, check_hardware=check_hardware)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError where an option makes no sense, alone or with another."""
    _, response = parse_lengths(options.lengths)
    for name in ("steps", "requests"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1.")
    if options.ragged and "generate" not in phases_of(options.phase):
        raise UserError(f"--ragged is about sampling and conflicts with --phase {options.phase}. "
                        "Give --phase generate.")
    if options.ragged and response.low == response.high:
        raise UserError(f"--ragged draws budgets between two numbers, and --lengths "
                        f"{options.lengths} has one for responses. Give LOW-HIGH, as in "
                        "256,64-192.")


def _peer(name: str) -> type[Peer]:
    if name == "transformers":
        return Peer
    try:
        from megatron_irl.bench.trl_peer import TrlPeer
    except ImportError as error:
        raise UserError(f"--peer trl needs trl and datasets ({error}). Install them, or give "
                        "--peer transformers.") from error
    return TrlPeer


def case_name(case: Case, headers: Headers, phase: str) -> str:
    """What tells results apart that may be compared: model, layout, work."""
    transformer, parallel = headers.architecture.transformer, case.recipe.parallel
    train = case.recipe.train
    at_once = (f"{train.micro_batch_tokens} tokens" if train.micro_batch_tokens else
               train.micro_batch_size)
    work = (f"{case.requests} requests" if phase in ("generate", "reference") else
            f"{at_once} of {train.global_batch_size} "
            f"{'pairs' if headers.algorithm.draws_samples else 'sequences'}")
    if phase in ("train", "reference") and not train.share_prompts:
        work = f"{work} prompts apart"
    places = case.recipe.generation.max_requests
    if phase == "generate" and places < case.requests:
        work = f"{work} at {places} places"
    if phase == "generate" and case.recipe.generation.cuda_graphs == "off":
        work = f"graphs off {work}"
    if phase == "generate" and parallel.pipeline_model_parallel_size > 1:
        work = f"{case.recipe.generation.pipeline} {work}"
    adapter = f" lora{headers.adapter.rank}" if headers.adapter else ""
    return (f"{phase} {headers.architecture.family} {transformer['num_layers']}x"
            f"{transformer['hidden_size']} {case.recipe.precision}{adapter} "
            f"tp{parallel.tensor_model_parallel_size} pp{parallel.pipeline_model_parallel_size} "
            f"{work} {case.prompt},{case.response}")


def _several(options: argparse.Namespace, argv: list[str]) -> list[dict[str, Any]]:
    """Each value of a sweep, and us and the peer, in a process of its own: memory is its own."""
    keys, _, values = (options.sweep or "").partition("=")
    if options.sweep and (not keys or not values):
        raise UserError(f"--sweep {options.sweep} is not key=a,b,c.")
    plain = [word for word in argv if word not in ("--sweep", options.sweep)]
    results: list[dict[str, Any]] = []
    for value in values.split(","):  # of no sweep the one value ""
        swept = dict.fromkeys(keys.split(","), value) if keys else {}
        more = [word for key in swept for word in
                (("--requests", value) if key == "requests" else (f"{key}={value}",))]
        ours = _child([*plain, *more, "--role", "ours"])
        if options.peer:
            _compare(ours, _child([*plain, *more, "--role", "peer"]))
        for result in ours:
            result |= {k: v for k, v in swept.items() if k != "requests"}
            result |= {"sweep": f"{keys}={value}"} if swept else {}
            sys.stdout.write(f"{result.get('sweep', '')} {_row(result)}\n".lstrip())
        sys.stdout.flush()
        results += ours
    return results


def _compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Give our results the peer's numbers; a round of both is a result more."""
    other = {result["phase"]: result for result in theirs}
    shared = [result for result in ours if result["phase"] in other]
    memory = "memory/peak_allocated" if "memory/peak_allocated" in ours[0] else (
        "memory/peak_added")
    for result in shared:
        their = other[result["phase"]]
        result |= {"peer_seconds": their["seconds"], "peer_memory": their[memory],
                   "ratio": their["seconds"] / result["seconds"],
                   "memory_ratio": result[memory] / their[memory]}
    if len(shared) > 1:
        # Of the generation and reference of so many pairs, and a step on a batch for each.
        seconds, peer = (sum(r["seconds"] for r in group if r["phase"] in other)
                         for group in (shared, theirs))
        most = [max(r[memory] for r in group) for group in (shared, theirs)]
        ours.append({"phase": "round", "seconds": seconds, "peer_seconds": peer,
                     "ratio": peer / seconds, memory: most[0], "peer_memory": most[1],
                     "memory_ratio": most[0] / most[1]})


def _child(argv: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-m", "megatron_irl", *argv], capture_output=True,
                          text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if done.returncode == 2:
        said = [line for line in done.stderr.splitlines() if line.startswith("megatron-irl: ")]
        raise UserError((said or ["a benchmark failed"])[-1].removeprefix("megatron-irl: "))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])["results"]


def _row(result: dict[str, Any]) -> str:
    cells = [f"{name.split('/')[-1]} {result[name]:,.4g}" for name in COLUMNS
             if result.get(name) is not None]
    return f"{result['phase']:10}" + "  ".join(cells)


def _finish(
    options: argparse.Namespace, results: list[dict[str, Any]], baseline: list[dict[str, Any]]
) -> None:
    """Warn of falls, draw, and print everything as JSON."""
    if not options.role:
        for text in falls(results, baseline):
            sys.stderr.write(f"WARNING: {text}\n")
        if options.plot is not None:
            draw(results, options.plot)
    sys.stdout.write(json.dumps({"results": results}) + "\n")
    sys.stdout.flush()


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of every result, as bars."""
    from matplotlib.figure import Figure

    shown = [result for result in results if "tokens_per_second" in result]
    figure = Figure((7, 0.5 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{result.get('case', result['phase'])} {result.get('sweep', '')}" for result in shown]
    axes.barh(range(len(shown)), [result["tokens_per_second"] for result in shown])
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second")
    figure.savefig(path)

