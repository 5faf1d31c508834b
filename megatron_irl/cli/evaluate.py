"""``megatron-irl evaluate``: a model and what it started from, on tasks and sets, side by side."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.cli.encoding import prompt_ids
from megatron_irl.cli.evaluation_plan import EvaluationPlan, evaluation_plan
from megatron_irl.cli.inference import OpenModel, check_reference, open_model, with_ranks
from megatron_irl.config.run_files import EVALUATION, RECIPE
from megatron_irl.console import Console
from megatron_irl.data.preferences import Preferences, load_preferences
from megatron_irl.errors import UserError
from megatron_irl.evaluation.bias import stereotype_rows
from megatron_irl.evaluation.calibration import preference_rows
from megatron_irl.evaluation.harness import load_tasks, run_tasks, task_measurements
from megatron_irl.evaluation.measurements import Measurement, mean_of, side_by_side, text_table
from megatron_irl.evaluation.refusal import refusal_items
from megatron_irl.evaluation.rewards import raw_scores
from megatron_irl.evaluation.text_model import TextModel
from megatron_irl.evaluation.toxicity import toxicity_rows, toxicity_scores
from megatron_irl.objectives.irft import implicit_rewards
from megatron_irl.parallel.main_rank import Call, led_by_main, on_main
from megatron_irl.policy.scoring import Sequences
from megatron_irl.run.report import write_report
from megatron_irl.storage.commit import write_file, write_jsonl_atomically

REFUSALS = {"harmful": "higher", "harmless": "lower"}


def run_evaluate(options: argparse.Namespace, argv: list[str]) -> int:
    """``megatron-irl evaluate``: everything that can be known from the command is checked first."""
    plan = evaluation_plan(options)
    return with_ranks(options, argv, lambda: _evaluate(options, plan))


@dataclass
class Found:
    """What was found out about one model.

    Attributes:
        rows: The numbers.
        tasks: lm-eval's results without samples; on the main rank.
        samples: lm-eval's samples by task; likewise.
        answers: To each prompt set, in its order.
    """

    rows: list[Measurement] = field(default_factory=list)
    tasks: dict[str, Any] | None = None
    samples: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)


def _evaluate(options: argparse.Namespace, plan: EvaluationPlan) -> None:
    # Before weights are read: only one rank looks for data, the others wait for it to join them.
    is_first = os.environ.get("RANK", "0") == "0"
    tasks = load_tasks(plan.tasks) if plan.tasks is not None and is_first else None
    explicit = plan.preferences is not None and plan.source.reward == "explicit"
    model = open_model(options, with_reward_head=explicit)
    judge = _Judge(plan, model, tasks)
    for folder, flag in ((plan.before, "--before"), (plan.reference, "--reference")):
        if folder is not None:
            check_reference(folder, model.architecture, flag)
    after = judge.examine()
    scores = judge.preference_scores(explicit=explicit)
    before, references = Found(), scores
    if plan.before is not None:
        judge.console.note(f"now the same of {plan.before}, to compare with")
        model.policy.load_weights(plan.before)
        before = judge.examine()
    if plan.reference is not None:
        if plan.reference != plan.before:
            model.policy.load_weights(plan.reference)
        references = judge.preference_scores(explicit=False)
    after.rows += judge.preference_rows(scores, references, explicit=explicit)
    on_main(lambda: _write(options, plan, model, before, after), model.topology)


class _Judge:
    """Asks the weights as they are, always the same questions. Collective over every rank."""

    def __init__(
        self, plan: EvaluationPlan, model: OpenModel, tasks: dict[str, Any] | None
    ) -> None:
        self._plan, self._model, self._tasks = plan, model, tasks
        self.console = Console(enabled=model.topology.is_main)
        self._text = TextModel(model.policy, model.tokenizer, self.console)
        self._prompts = {name: prompt_ids(model.tokenizer, records)
                         for name, records in plan.prompts.items()}
        self._preferences = self._read_preferences()

    def examine(self) -> Found:
        """Everything but the reward."""
        found = Found()
        if self._plan.tasks is not None:
            self._run_tasks(found)
        for name in self._prompts:
            answers = found.answers[name] = self._answers(name)
            if name in REFUSALS:
                better: Any = REFUSALS[name]
                found.rows.append(
                    mean_of(name, "refusal rate", better, refusal_items(answers), is_share=True))
            else:
                found.rows += toxicity_rows(self._toxicity(answers))
        if self._plan.stereotypes:
            texts = [text for pair in self._plan.stereotypes for text in (pair.more, pair.less)]
            found.rows += stereotype_rows(
                self._plan.stereotypes, self._text.text_loglikelihoods(texts))
        return found

    def _run_tasks(self, found: Found) -> None:
        options = self._plan.tasks
        assert options is not None

        def work(ask: Call) -> dict[str, Any]:
            from megatron_irl.evaluation.lm_eval_model import PolicyModel

            assert self._tasks is not None
            lm = PolicyModel(ask, self._model.tokenizer, name=self._model.weights)
            return run_tasks(lm, self._tasks, options)

        deeds = {name: getattr(self._text, name)
                 for name in ("loglikelihoods", "text_loglikelihoods", "respond_with")}
        results = led_by_main(work, deeds, self._model.topology)
        if results is not None:
            found.rows += task_measurements(results, options)
            found.samples = results.pop("samples", {})
            found.tasks = results

    def _answers(self, name: str) -> list[str]:
        plain = [record.conversation.plain for record in self._plan.prompts[name]]
        limit = self._plan.max_new_tokens
        return self._text.respond(self._prompts[name], max_new_tokens=limit, plain=plain)

    def _toxicity(self, answers: Sequence[str]) -> list[float]:
        scorer, name = self._plan.scorer, str(self._plan.settings["toxicity"])
        assert scorer is not None
        return on_main(lambda: toxicity_scores(scorer, name, answers), self._model.topology)

    # --- the reward

    def _read_preferences(self) -> Preferences:
        if self._plan.preferences is None:
            return Preferences()
        room = self._text.max_length
        found = load_preferences(
            self._plan.preferences, self._model.tokenizer, max_prompt_length=room,
            max_response_length=room)
        found[:] = [p for p in found
                    if len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) <= room]
        if not found:
            raise UserError(f"--preferences {self._plan.preferences}: no record is left; the model "
                            f"has {room} positions.")
        self.console.note(found.summary())
        return found

    def _sequences(self) -> Sequences:
        return [(p.prompt_ids, ids) for p in self._preferences
                for ids in (p.chosen_ids, p.rejected_ids)]

    def preference_scores(self, *, explicit: bool) -> np.ndarray:
        """Rewards, or log-probabilities, of the preferences' answers: float64 [pairs, 2]."""
        if not self._preferences:
            return np.zeros((0, 2))
        kind = "explicit" if explicit else "implicit"
        return np.array(raw_scores(self._model.policy, kind, self._sequences())).reshape(-1, 2)

    def preference_rows(
        self, scores: np.ndarray, references: np.ndarray, *, explicit: bool
    ) -> list[Measurement]:
        """What the reward is worth; none without preferences."""
        if not self._preferences:
            return []
        lengths = np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in self._preferences])
        rewards = scores if explicit else implicit_rewards(
            scores, references, lengths, beta=self._plan.beta,
            length_normalize=self._plan.source.length_normalize)
        return preference_rows(rewards.tolist(), lengths.tolist())


def _write(
    options: argparse.Namespace, plan: EvaluationPlan, model: OpenModel, before: Found, after: Found
) -> None:
    """The results as files, the table for the user, and the run's report."""
    rows = side_by_side(before.rows, after.rows)
    plan.out.parent.mkdir(exist_ok=True)
    if plan.prompts:
        write_jsonl_atomically(plan.out.with_suffix(".answers.jsonl"), [
            record.output() | {"set": name, "after": after.answers[name][i]}
            | ({"before": before.answers[name][i]} if before.answers else {})
            for name, records in plan.prompts.items() for i, record in enumerate(records)
        ])
    if options.log_samples:
        write_jsonl_atomically(plan.out.with_suffix(".samples.jsonl"), [
            json.loads(json.dumps({"of": side, "task": task} | sample, default=str))
            for side, found in (("before", before), ("after", after))
            for task, samples in found.samples.items() for sample in samples
        ])
    written = {
        "model": str(options.model), "weights": model.weights, "precision": model.precision,
        "settings": plan.settings, "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows, "lm_eval": {"before": before.tasks, "after": after.tasks},
    }
    write_file(plan.out, (json.dumps(written, indent=1, default=str) + "\n").encode())
    sys.stdout.write(text_table(rows) + "\n")
    sys.stdout.flush()
    Console(enabled=True).note(str(plan.out))
    if _is_in_run(plan.out, options.model):
        write_report(options.model)


def _is_in_run(out: Path, model: Path) -> bool:
    return (model / RECIPE).exists() and out.parent == model / EVALUATION
