"""``report.html``: one self-contained page about a run, finished or not.

Everything comes from the run folder's ``recipe.yaml``, ``metrics.jsonl`` and ``rounds.jsonl``;
what is missing there is missing on the page. No scripts, no external requests.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_irl.algorithms.registry import REGISTRY, rules_of
from megatron_irl.algorithms.rules import AlgorithmRules, section
from megatron_irl.config.run_files import EVALUATION, RECIPE
from megatron_irl.console import format_seconds
from megatron_irl.errors import UserError
from megatron_irl.evaluation.measurements import table
from megatron_irl.run.charts import evaluation_charts, round_charts, step_charts
from megatron_irl.run.comparison import shown_columns
from megatron_irl.run.guard import CollapseGuard
from megatron_irl.run.runlog import RunLog
from megatron_irl.storage.commit import read_json, write_file

REPORT_FILE = "report.html"

_TEMPLATE = "report_template.html"
_LAYOUT = (("tensor_model_parallel_size", "TP"), ("pipeline_model_parallel_size", "PP"),
           ("virtual_pipeline_model_parallel_size", "VPP"), ("context_parallel_size", "CP"),
           ("data_parallel_size", "DP"))
_MAX_EXAMPLES = 8

Record = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder, replacing an older one atomically.

    Returns:
        Path of the page.

    Raises:
        UserError: ``run_dir`` is not a run folder, a log is damaged, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    log = RunLog(run_dir)
    recipe_path = run_dir / RECIPE
    if not any(path.exists() for path in (recipe_path, log.metrics_path, log.rounds_path)):
        raise UserError(f"{run_dir} is not a run folder: it has no {RECIPE}, metrics.jsonl or "
                        "rounds.jsonl. Give the output_dir of a run.")
    page = render_report(run_dir.resolve().name, _read_recipe(recipe_path), log.read_metrics(),
                         log.read_rounds(), read_comparisons(run_dir / EVALUATION))
    path = run_dir / REPORT_FILE
    write_file(path, page.encode(errors="replace"))
    return path


def render_report(name: str, recipe: Record, metrics: Sequence[Record],
                  rounds: Sequence[Record], comparisons: Sequence[Record] = ()) -> str:
    """Return the page as HTML.

    Args:
        name: Of the run, for the title.
        recipe: Resolved recipe with its ``environment`` block; {} where unknown.
        metrics: Lines of ``metrics.jsonl``.
        rounds: Lines of ``rounds.jsonl``.
        comparisons: What ``evaluate`` wrote, each with its ``name``.
    """
    evaluations = evaluation_rows(rounds)
    columns = shown_columns([evaluation for _, evaluation in evaluations])
    rules = _rules(recipe)
    explicit = rules is not None and rules.reward == "explicit"
    charts = step_charts(
        metrics, ln2_line=_starts_at_ln2(recipe, metrics), explicit_reward=explicit
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(_TEMPLATE).render(
        name=name,
        facts=_facts(recipe),
        status=_status(recipe, metrics, rounds),
        warnings=_warnings(metrics, rounds, explicit_reward=explicit),
        evaluation_titles=[title for title, _ in columns],
        evaluation_rows=[(label, [text(evaluation) for _, text in columns])
                         for label, evaluation in evaluations],
        comparisons=[(record["name"], record.get("weights", ""), table(record["rows"]))
                     for record in comparisons],
        step_charts=charts,
        round_charts=evaluation_charts(evaluations) + round_charts(rounds),
        generation=_generation_table(rounds),
        examples=_examples(rounds),
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def read_comparisons(folder: Path) -> list[dict[str, Any]]:
    """What ``evaluate`` left in a run folder, the newest first; other files are passed over."""
    found = []
    for path in folder.glob("*.json"):
        written = read_json(path)
        if isinstance(written, dict) and isinstance(written.get("rows"), list):
            found.append(written | {"name": path.stem})
    return sorted(found, key=lambda each: str(each.get("written")), reverse=True)


def evaluation_rows(rounds: Sequence[Record]) -> list[tuple[str, Record]]:
    """Return (label, evaluation): before training first, then after each round that has one."""
    rows = []
    before = section(rounds[0], "evaluation_before") if rounds else {}
    if before:
        rows.append(("before", before))
    for i, record in enumerate(rounds):
        evaluation = section(record, "evaluation")
        if evaluation:
            rows.append((f"round {record.get('round', i)}", evaluation))
    return rows


def _starts_at_ln2(recipe: Record, metrics: Sequence[Record]) -> bool:
    """Whether a curve of the loss chart is a sigmoid margin loss, ln 2 where nothing is learnt yet.

    With an anchor or a stream of preferences the whole loss is more than that; then it is the part
    that the metrics name, where they do.
    """
    rules = _rules(recipe)
    if rules is None:
        return False
    is_ln2, part = rules.ln2_curve(recipe)
    return is_ln2 and (not part or any(part in line for line in metrics))


def _rules(recipe: Record) -> AlgorithmRules | None:
    """The run's algorithm; None where this version does not know it."""
    name = section(recipe, "algorithm").get("name")
    return rules_of(name) if name in REGISTRY else None


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}. Restore it, or remove it.") from error
    return recipe if isinstance(recipe, dict) else {}


def _facts(recipe: Record) -> list[tuple[str, str]]:
    """Return what the page's head lists, leaving out what is unknown."""
    algorithm, parallel = section(recipe, "algorithm"), section(recipe, "parallel")
    environment, train = section(recipe, "environment"), section(recipe, "train")
    layout = " × ".join(f"{short}{parallel[key]}" for key, short in _LAYOUT if parallel.get(key))
    if parallel.get("sequence_parallel"):
        layout += " + SP"
    if parallel.get("expert_model_parallel_size", 1) > 1:
        layout += " + whole experts"
    rules = _rules(recipe)
    method = [algorithm.get("name"), *(rules.facts(recipe) if rules else ())]
    versions = section(environment, "versions")
    optimizer, adapter = section(recipe, "optimizer"), section(recipe, "adapter")
    lora = adapter.get("rank") is not None or adapter.get("path") is not None
    facts = {
        "Model": section(recipe, "model").get("hf"),
        "Algorithm": ", ".join(str(part) for part in method if part is not None),
        "Schedule": _join({"rounds": algorithm.get("rounds"),
                           "steps per round": algorithm.get("steps_per_round"),
                           "reward steps": algorithm.get("reward_steps"),
                           "policy steps": algorithm.get("policy_steps"),
                           "batch": train.get("global_batch_size"), "lr": optimizer.get("lr")}),
        "Adapters": _join({**{key: adapter.get(key) for key in ("rank", "alpha", "path")},
                           "on": _listed(adapter.get("targets"))}) if lora else None,
        "Layout": layout,
        "Precision": recipe.get("precision"),
        "Data": _data(section(recipe, "data")),
        "Seed": recipe.get("seed"),
        "Versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "Git revision": environment.get("git_revision"),
    }
    shown = {"versions", "git_revision"}
    for key, value in environment.items():
        if key not in shown and not isinstance(value, Mapping):
            facts[key.replace("_", " ").capitalize()] = (
                " ".join(map(str, value)) if isinstance(value, list) else value)
    return [(key, str(value)) for key, value in facts.items() if value not in (None, "")]


def _join(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in parts.items() if value is not None)


def _data(section: Record) -> str:
    return _listed(section.get("train"))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _status(recipe: Record, metrics: Sequence[Record],
            rounds: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the few numbers at the top: how far the run is and what it has cost."""
    algorithm = section(recipe, "algorithm")
    planned = algorithm.get("rounds")
    status = [("rounds", f"{len(rounds)} of {planned}" if planned else str(len(rounds)))]
    steps = max((line["step"] for line in metrics if isinstance(line.get("step"), int)), default=0)
    per_round = algorithm.get("steps_per_round") or (
        (algorithm.get("reward_steps") or 0) + (algorithm.get("policy_steps") or 0))
    total = f" of {planned * per_round:,}" if planned and per_round else ""
    status.append(("optimizer steps", f"{steps:,}{total}"))
    seconds = sum(section(record, "time").get("total") or 0 for record in rounds)
    if seconds:
        status.append(("time in rounds", format_seconds(seconds)))
    tokens = sum(line.get("tokens") or 0 for line in metrics)
    if tokens:
        status.append(("tokens trained on", f"{tokens:,}"))
    return status


def _warnings(
    metrics: Sequence[Record], rounds: Sequence[Record], *, explicit_reward: bool
) -> list[tuple[Any, str]]:
    """Return (round, warning): those in the round lines, and those of a round in progress."""
    found = [(record.get("round", i), text) for i, record in enumerate(rounds)
             for text in record.get("guard") or []]
    running = metrics[-1].get("round") if metrics else None
    if running is not None and all(record.get("round") != running for record in rounds):
        guard = CollapseGuard(has_implicit_reward=not explicit_reward)
        for line in metrics:
            if line.get("round") == running:
                guard.feed(line)
        found += [(running, text) for text in guard.check()]
    return found


def _generation_table(rounds: Sequence[Record]) -> list[list[str]]:
    """Return a header row and a row per round about its samples; [] for runs without any."""
    columns = (("samples", "samples", ",.0f"), ("tokens", "tokens", ",.0f"),
               ("tokens_per_second", "tokens/s", ",.0f"), ("mean_length", "mean length", ".1f"),
               ("truncated", "truncated", ",.0f"), ("duplicates", "duplicates", ",.0f"),
               ("empty", "empty", ",.0f"), ("usable", "usable", ",.0f"),
               ("repetition", "repeated 4-grams", ".1%"))
    records = [(record.get("round", i), section(record, "generation"))
               for i, record in enumerate(rounds)]
    shown = [column for column in columns if any(column[0] in record for _, record in records)]
    if not shown:
        return []
    table = [["round", *(title for _, title, _ in shown)]]
    for index, record in records:
        values = [(record.get(key), form) for key, _, form in shown]
        table.append([str(index), *(format(value, form) if isinstance(value, int | float) else "–"
                                    for value, form in values)])
    return table


def _examples(rounds: Sequence[Record]) -> list[dict[str, str]]:
    """Return prompts answered before training and after the last round that shows examples."""
    having = [record["examples"] for record in rounds if record.get("examples")]
    if not having:
        return []
    first = {_as_text(e.get("prompt")): e for e in having[0]}
    return [
        {"prompt": _as_text(e.get("prompt")), "demonstration": _as_text(e.get("demonstration")),
         "before": _as_text(first.get(_as_text(e.get("prompt")), e).get("before")),
         "after": _as_text(e.get("after"))}
        for e in having[-1][:_MAX_EXAMPLES]
    ]


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}"
                         if isinstance(turn, Mapping) else str(turn) for turn in value)
    return "" if value is None else str(value)
