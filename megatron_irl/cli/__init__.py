"""The command line: parse, check, start ranks, run. Heavy imports wait until a command needs them.

Exit codes: 0 done, 2 the user's input is wrong (one message, no traceback), 75 stopped as asked (a
signal, or the time limit of the job) and 76 ended by the watchdog, both to be resumed by the same
command, 1 anything else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_irl import __version__
from megatron_irl.cli.evaluate_options import add_evaluate_options
from megatron_irl.cli.ranks import adopt_environment, follow_launcher, may_tell, run_ranks
from megatron_irl.config.run_files import IDENTITY, RECIPE
from megatron_irl.config.schema import FormatName, Recipe
from megatron_irl.errors import STOPPED, RunStopped, UserError, is_told_elsewhere


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    follow_launcher()
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    try:
        return options.run(options, arguments)
    except UserError as error:
        if is_told_elsewhere(error):
            time.sleep(1)  # a launcher that sees this rank end ends the one that is just telling
        else:
            _say(str(error), once=True)
        return 2
    except RunStopped as stop:
        if os.environ.get("RANK", "0") == "0":
            _say(str(stop))
        return STOPPED
    except KeyboardInterrupt:
        _say("interrupted; start the same command again to resume")
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Overrides may stand behind options too, which argparse does not know of by itself."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:
        if not hasattr(options, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="megatron-irl", description="Reward learning from demonstrations on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=f"megatron-irl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe (or resume its run folder)")
    train.add_argument("recipe", type=_path, help="YAML recipe")
    train.add_argument("overrides", nargs="*", help="section.key=value, taken as YAML")
    train.set_defaults(run=_train)

    _add_plan(commands)
    _add_benchmark(commands)
    _add_generate(commands)
    _add_score(commands)
    evaluate = commands.add_parser("evaluate", help="what got better and what got worse: tasks of "
                                   "lm-eval, refusals, stereotypes, preferences")
    _model_options(evaluate)
    add_evaluate_options(evaluate, _path)
    evaluate.set_defaults(run=_evaluate)

    keep = commands.add_parser("filter", help="demonstrations that a run's reward rates high")
    keep.add_argument("run_folder", type=_path, metavar="RUN",
                      help="run folder with a ledger (rft)")
    keep.add_argument("--out", type=_path, required=True, help="JSONL file to write")
    keep.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    keep.add_argument("--min-reward", type=float, help="keep rewards of at least this")
    keep.add_argument("--top-quantile", type=float, help="keep the best share, in (0, 1]")
    keep.add_argument("--round", type=int, help="round of the ledger (default: the newest)")
    keep.set_defaults(run=_filter)

    report = commands.add_parser("report", help="rewrite report.html of a run folder")
    report.add_argument("folder", type=_path)
    report.set_defaults(run=_report)
    return parser


def _add_benchmark(commands: Any) -> None:
    bench = commands.add_parser("benchmark", help="time the phases of a recipe on this machine")
    bench.add_argument("recipe", type=_path)
    bench.add_argument("overrides", nargs="*")
    bench.add_argument("--phase", default="round", choices=("train", "generate", "reference",
                                                            "round", "save", "all"))
    bench.add_argument("--random-weights", action="store_true", help="of the model only "
                       "config.json is read")
    bench.add_argument("--lengths", default="256-512,256-512", metavar="PROMPT,RESPONSE",
                       help="tokens, each a number or LOW-HIGH")
    bench.add_argument("--requests", type=int, default=64, help="prompts that are sampled for")
    bench.add_argument("--steps", type=int, default=5, help="repeats, of which the median counts")
    bench.add_argument("--warmup", type=int, default=2, help="repeats before them")
    bench.add_argument("--ragged", action="store_true", help="sample with budgets between LOW and "
                       "HIGH of the responses' --lengths too, beside equal ones of the same sum")
    bench.add_argument("--sweep", metavar="KEY=A,B,C", help="time it for each value of a key, of "
                       "several (KEY,KEY=A,B), or of requests")
    bench.add_argument("--peer", choices=("transformers", "trl"), help="time the same work in "
                       "transformers alone, or by trl's DPOTrainer")
    bench.add_argument("--baseline", type=_path, help="warn of what is over 10%% slower than in "
                       "this file, such as benchmarks/h100.json")
    bench.add_argument("--plot", type=_path, metavar="FILE", help="draw tokens a second")
    bench.add_argument("--role", choices=("ours", "peer"), help=argparse.SUPPRESS)
    bench.set_defaults(run=_benchmark)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="check a recipe; say what memory and time it takes")
    plan.add_argument("recipe", type=_path)
    plan.add_argument("overrides", nargs="*")
    plan.add_argument("--world-size", type=int, metavar="N", help="ranks (default: the recipe's "
                      "layout with its data_parallel_size)")
    plan.add_argument("--gpu", default="h100", help="what the ranks run on: h100, h200, a100, b200 "
                      "and others")
    plan.add_argument("--lengths", metavar="PROMPT,RESPONSE[,RECORDS]", help="mean tokens; the "
                      "recipe's data are not looked at, and of the model only config.json")
    plan.add_argument("--search", action="store_true", help="list the fastest layouts that fit "
                      "even if the recipe's does")
    plan.add_argument("--json", action="store_true", help="print everything as one JSON object")
    plan.add_argument("--picture", type=_path, metavar="FILE", help="draw memory by stage and "
                      "phase (.svg, .png or .pdf)")
    plan.add_argument("--show", type=int, metavar="N", help="show N demonstrations as the model "
                      "sees them, and how long all of them are")
    plan.set_defaults(run=_plan)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="sample responses for a file of prompts")
    _model_options(generate)
    generate.add_argument("--prompts", type=_path, required=True, help='{"prompt": ...} records, '
                          "or whatever train takes: the last answer is left out")
    _file_options(generate)
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=1234)
    generate.add_argument("--num-samples", type=int, default=1, help="responses to each prompt, "
                          "a line each")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end "
                          "responses before this text; may be given several times")
    generate.add_argument("--system", metavar="TEXT", help="system turn for prompts without one")
    generate.add_argument("--stream", action="store_true", help="also print each line to "
                          "standard output as soon as it is finished, in that order")
    generate.add_argument("--part-size", "--chunk-size", type=int, help="lines per model replica "
                          "between two writes of finished ones (default: 1024, with --stream 64); "
                          "changes no response; --chunk-size is its name of before")
    generate.set_defaults(run=_generate)


def _add_score(commands: Any) -> None:
    score = commands.add_parser("score", help="rewards of given responses")
    _model_options(score)
    score.add_argument("--pairs", type=_path, required=True, help='{"prompt": ..., "responses": '
                       '[...]} records, lines that generate wrote, or whatever train takes')
    _file_options(score)
    score.add_argument("--reference", type=_path, help="HF folder of the reference policy "
                       "(default: the model the run started from)")
    score.add_argument("--beta", type=float, help="implicit reward scale (default: the run's "
                       "last; for HF folders 1)")
    score.set_defaults(run=_score)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=_path, required=True, help="JSON lines, or Parquet if the "
                        "name ends in .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished --out")
    parser.add_argument("--format", choices=get_args(FormatName), default="auto",
                        help="form of the records, as data.format")
    parser.add_argument("--field", action="append", metavar="OURS=THEIRS", help="a field of "
                        "another name, as data.fields; may be given several times")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=_path, required=True, help="HF folder or run folder")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"],
                        help="default: the run's (fp8: bf16); for an HF folder bf16 on GPU, fp32 "
                        "on CPU")
    parser.add_argument("--chat-template", help="Jinja file or text, if the tokenizer has none")


def _train(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.config import check_layout, load_recipe
    from megatron_irl.storage.lease import refuse_if_held

    recipe = load_recipe(options.recipe, options.overrides)
    world_size = adopt_environment()
    if os.environ.get("RANK", "0") == "0":
        refuse_if_held(Path(recipe.output_dir), watch=False)  # before anything takes time
    if world_size is None:
        size = recipe.parallel.model_parallel_size * recipe.parallel.data_parallel_size
        if size > 1:
            if _was_finished(recipe):
                _say(f"{recipe.output_dir} is finished; nothing to do.")
                return 0
            return run_ranks(argv, size)
    check_layout(recipe, world_size)
    _train_rank(recipe, argv)
    return 0


def _was_finished(recipe: Recipe) -> bool:
    """Whether the output folder is a finished run of this recipe, known without reading data."""
    if not (Path(recipe.output_dir) / IDENTITY).exists():
        return False
    from megatron_irl.run.folder import RunFolder

    return RunFolder(Path(recipe.output_dir)).was_finished_by(recipe)


def _train_rank(recipe: Recipe, argv: list[str]) -> None:
    """Train on this rank, listening for requests to stop from the first import on."""
    from megatron_irl.parallel.stop_request import StopRequest

    stop = StopRequest(recipe.checkpoint.stop_part_seconds)
    with stop.listening():
        with stop.at_once():
            from megatron_irl.parallel.main_rank import on_main
            from megatron_irl.parallel.topology import initialize, shutdown
            from megatron_irl.run.inputs import read_inputs
            from megatron_irl.run.loop import train
            from megatron_irl.run.prediction import check_memory
            from megatron_irl.run.time_limit import TimeLimit

            was_finished = _was_finished(recipe)
            inputs = None if was_finished else read_inputs(recipe, check=check_memory)
            if inputs is not None and int(os.environ.get("RANK", "0")) == 0:
                for note in inputs.notes:
                    _say(note)
        topology = initialize(recipe.parallel, seed=recipe.seed, stop=stop)
        # As the main rank saw it: another may have looked a moment earlier or later.
        if on_main(lambda: was_finished, topology):
            if topology.is_main:
                _say(f"{recipe.output_dir} is finished; nothing to do.")
            shutdown()
            return
        inputs = inputs or read_inputs(recipe, check=check_memory)
        if topology.is_main:
            limit = TimeLimit(recipe.checkpoint.stop_before)
            stop.time_is_up = limit.is_near
            if limit.seconds is not None and not limit.is_known:
                _say(f"checkpoint.stop_before={limit.seconds:g} has no effect: Slurm names no time "
                     "limit for this process")
        try:
            train(inputs, topology, argv)
        except RunStopped:
            shutdown()
            raise
        shutdown()


def _plan(options: argparse.Namespace, argv: list[str]) -> int:
    del argv
    if options.show is not None and options.show < 0:
        raise UserError(f"--show {options.show} must be at least 0.")
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size {options.world_size} must be at least 1.")
    os.environ["MEGATRON_IRL_PLATFORM"] = "cpu"  # a plan is made without a GPU, on any machine
    from megatron_irl.cli.plan import run_plan

    planned = run_plan(options)
    sys.stdout.write(planned.text)
    return planned.code


def _benchmark(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.cli.benchmark import run_benchmark

    return run_benchmark(options, argv)


def _generate(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.cli.generate import run_generate

    return run_generate(options, argv)


def _score(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.cli.inference import run_score

    return run_score(options, argv)


def _evaluate(options: argparse.Namespace, argv: list[str]) -> int:
    if options.offline:  # before anything of Hugging Face is imported, and for the ranks too
        os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    from megatron_irl.cli.evaluate import run_evaluate

    return run_evaluate(options, argv)


def _filter(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.cli.filter import filter_demonstrations

    del argv
    _say(filter_demonstrations(
        options.run_folder, options.out, min_reward=options.min_reward,
        top_quantile=options.top_quantile, round=options.round, overwrite=options.overwrite,
    ))
    return 0


def _report(options: argparse.Namespace, argv: list[str]) -> int:
    from megatron_irl.run.report import write_report

    del argv
    if not (options.folder / RECIPE).exists():
        raise UserError(f"{options.folder} is not a run folder: it has no {RECIPE}.")
    _say(str(write_report(options.folder)))
    return 0


def _say(message: str, *, once: bool = False) -> None:
    """Print for the user: rank 0 at once, another rank only if rank 0 did not fail too.

    Args:
        message: What to print.
        once: Only if no rank of this launcher has yet said why it ends.
    """
    in_slurm_step = "SLURM_STEP_ID" in os.environ  # before the ranks are taken from it
    rank = os.environ.get("RANK") or (in_slurm_step and os.environ.get("SLURM_PROCID")) or "0"
    if rank != "0":
        time.sleep(5)  # the launcher ends this rank meanwhile if rank 0 had the same to say
    if once and not may_tell():
        return
    prefix = "megatron-irl: " if rank == "0" else f"megatron-irl: [rank {rank}] "
    sys.stderr.write(prefix + message + "\n")
    sys.stderr.flush()
