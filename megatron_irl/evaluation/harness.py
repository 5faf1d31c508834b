"""lm-eval's tasks: found by name, loaded with their data, run, and read as measurements.

Everything here runs on the main rank. lm-eval is imported only when asked for.
"""

import contextlib
import importlib.util
import io
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.errors import UserError
from megatron_irl.evaluation.measurements import Measurement
from megatron_irl.evaluation.task_sets import TASK_SETS, TaskChoice

SEED = 1234  # of few-shot draws; lm-eval's own default
SHARES = ("acc", "acc_norm", "exact_match")  # metrics whose items are right or wrong


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are asked.

    Attributes:
        names: Of tasks, groups, tags and of ``TASK_SETS``.
        include_path: Folder of task files of the user's; they come before the package's.
        num_fewshot: Instead of the tasks' own, except where that is 0; None: their own.
        limit: Documents of each task; None: all.
        gen_kwargs: lm-eval's, ``key=value,...``; "" for none.
        chat: Ask through the chat template, with
        multiturn: the examples as turns of their own, and
        system: a system turn; None: none.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    gen_kwargs: str = ""
    chat: bool = False
    multiturn: bool = False
    system: str | None = None

    def choices(self) -> list[TaskChoice]:
        """The tasks, those of sets spelt out."""
        return [choice for name in self.names
                for choice in TASK_SETS.get(name, (TaskChoice(name, self.num_fewshot),))]


def require_lm_eval() -> None:
    """Raise UserError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs EleutherAI's lm-eval, which is not installed. Run: "
                        "pip install 'megatron-irl[lm-eval]' (or pip install 'lm-eval>=0.4.13').")


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """Find the tasks and load their data; lm-eval's ``TaskDict``.

    Raises:
        UserError: lm-eval is missing; a name that no task has; data that cannot be loaded.
    """
    require_lm_eval()
    choices = options.choices()
    manager = _manager(options, choices)
    unknown = [c.name for c in choices if c.name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks {','.join(unknown)}: {_no_such(manager, unknown[0], options)}")
    random.seed(0)  # some tasks shuffle their choices; lm-eval's own defaults
    np.random.seed(SEED)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for choice in choices:
        with _quiet():
            try:
                found = manager.load([choice.name])
            except Exception as error:  # the hub, the network and the task's code may fail anyhow
                raise _cannot_load(choice.name, error) from error
        for task in found["tasks"].values():
            _check(task, choice.name)
            _set_up(task, choice, options)
        for key in loaded:
            loaded[key] |= found.get(key, {})
    return loaded


def _manager(options: TaskOptions, choices: Sequence[TaskChoice]) -> Any:
    """The index of tasks, of no more folders than needed: reading all takes half a minute."""
    import lm_eval.tasks

    own = [] if options.include_path is None else [str(options.include_path)]
    with _quiet():
        manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
        rest = [choice for choice in choices if choice.name not in manager.all_tasks]
        if not rest:
            return manager
        home = Path(lm_eval.tasks.__file__).parent
        folders = [home / (choice.folder or choice.name) for choice in rest]
        if all(folder.is_dir() for folder in folders):
            paths = list(dict.fromkeys([*map(str, folders), *own]))
            manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
            if all(choice.name in manager.all_tasks for choice in choices):
                return manager
        return lm_eval.tasks.TaskManager(include_path=own)


def _no_such(manager: Any, name: str, options: TaskOptions) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*TASK_SETS, *manager.all_tasks], n=3)
    where = "lm-eval has no such task" if options.include_path is None else (
        f"neither {options.include_path} nor lm-eval has such a task")
    return (f"{where}{'; close to it are ' + ', '.join(near) if near else ''}. Give names that "
            "`lm-eval ls tasks` lists, or a folder of task files as --include-path.")


def _cannot_load(name: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return UserError(
        f"--tasks {name} cannot be loaded: {reason}. If this machine has no network, fill the "
        "cache of Hugging Face (HF_HOME) on one that has, copy it here and give --offline; or give "
        "task files over local data as --include-path.")


def _check(task: Any, name: str) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks {name} runs code that the model writes, on this machine. Leave "
                        "it out; export the model and use lm_eval itself where that is safe.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {name} needs images; these models read text. Leave it out.")


def _set_up(task: Any, choice: TaskChoice, options: TaskOptions) -> None:
    if options.gen_kwargs and task.get_config("output_type") == "generate_until":
        from lm_eval.utils import simple_parse_args_string

        task.set_config("generation_kwargs", simple_parse_args_string(options.gen_kwargs),
                        update=True)
    own = task.get_config("num_fewshot")
    if choice.shots is not None and own != 0:
        task.set_config("num_fewshot", choice.shots)
    elif own is None:
        task.set_config("num_fewshot", 0)


def run_tasks(model: Any, tasks: dict[str, Any], options: TaskOptions) -> dict[str, Any]:
    """lm-eval's results of a model; ``model`` is an ``lm_eval.api.model.LM``."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task._instances = None  # built anew for every model: answers are kept in them
        task.set_fewshot_seed(seed=SEED)  # the same examples for each
    with _quiet(), np.errstate(all="ignore"):
        return evaluate(
            lm=model, task_dict=tasks, limit=options.limit, bootstrap_iters=1000, log_samples=True,
            system_instruction=options.system, apply_chat_template=options.chat,
            fewshot_as_multiturn=options.multiturn)


def task_measurements(results: Mapping[str, Any], options: TaskOptions) -> list[Measurement]:
    """What lm-eval reports, group by group and task by task, then the mean of each named set.

    Tasks that were asked for as part of a group are in the group's number only.
    """
    found: list[Measurement] = []
    inner = {name for group in results.get("group_subtasks", {}).values() for name in group}
    asked = {choice.name: choice for choice in options.choices()}
    merged = {**results["results"], **results.get("groups", {})}
    for name, numbers in merged.items():
        if name in inner and name not in asked:
            continue
        wanted = asked[name].metric if name in asked else None
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if wanted is None or key == wanted:
                found.append(_measurement(results, name, metric, filter_name, numbers))
    for set_name in options.names:
        if set_name in TASK_SETS:
            found.append(_mean(set_name, found))
    return found


def _measurement(
    results: Mapping[str, Any], name: str, metric: str, filter_name: str,
    numbers: Mapping[str, Any],
) -> Measurement:
    value = float(numbers[f"{metric},{filter_name}"])
    error = numbers.get(f"{metric}_stderr,{filter_name}")
    direction = results.get("higher_is_better", {}).get(name, {}).get(metric)
    items = np.array([
        sample[metric] for task in _leaves(results, name)
        for sample in results.get("samples", {}).get(task, ())
        if sample.get("filter") == filter_name and isinstance(sample.get(metric), int | float)
    ], np.float64)
    is_mean = len(items) > 0 and math.isclose(float(items.mean()), value, abs_tol=1e-9)
    return Measurement(
        of=name, metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
        better=None if direction is None else "higher" if direction else "lower", value=value,
        stderr=float(error) if isinstance(error, int | float) else None,
        count=len(items) or _count(results, name), items=items if is_mean else None,
        is_share=is_mean and metric in SHARES and bool(np.isin(items, (0, 1)).all()))


def _leaves(results: Mapping[str, Any], name: str) -> list[str]:
    children = results.get("group_subtasks", {}).get(name)
    return [name] if not children else [leaf for c in children for leaf in _leaves(results, c)]


def _count(results: Mapping[str, Any], name: str) -> int:
    counts = results.get("n-samples", {})
    return sum(counts.get(leaf, {}).get("effective", 0) for leaf in _leaves(results, name))


def _mean(set_name: str, found: Sequence[Measurement]) -> Measurement:
    names = {choice.name for choice in TASK_SETS[set_name]}
    parts = [m for m in found if m.of in names]
    errors = [m.stderr for m in parts]
    error = None if None in errors or not errors else (
        math.sqrt(sum(e * e for e in errors if e is not None)) / len(parts))
    return Measurement(set_name, f"mean of {len(parts)}", "higher",
                       float(np.mean([m.value for m in parts])), error, len(parts))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs by the page and draws bars of its own; what matters of it is in the results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
