"""The report is complete, self-contained and safe, and stands any missing key."""

import random
import re
from html.parser import HTMLParser

import pytest
import yaml

from megatron_irl.errors import UserError
from megatron_irl.run.charts import step_charts
from megatron_irl.run.report import evaluation_rows, render_report, write_report
from megatron_irl.run.runlog import RunLog

VOID = {"meta", "link", "br", "img", "use", "path", "rect"}
HOSTILE = "</pre><script>alert('x')</script>"

RECIPE = {
    "model": {"hf": "/models/tiny"}, "data": {"train": ["demos.jsonl"]}, "precision": "bf16",
    "algorithm": {"name": "irft", "rounds": 3, "steps_per_round": 20, "beta": [0.1, 0.1, 0.1],
                  "loss": "sigmoid", "reference": "round_start", "nll_coefficient": 0.2},
    "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
                 "virtual_pipeline_model_parallel_size": None, "sequence_parallel": True},
    "environment": {"versions": {"torch": "2.15.0"}, "git_revision": "deadbeef",
                    "command": ["megatron-irl", "train"], "world_size": 2},
}


def metric(step, round_index):
    return {"step": step, "round": round_index, "loss": 0.6, "loss/margin": 0.5,
            "grad_norm": 1.5, "lr": 1e-5, "reward/demo": 0.1, "reward/sample": -0.1,
            "reward/margin": 0.2, "reward/accuracy": 0.7, "logp/demo": -20.0,
            "logp/sample": -30.0, "length/demo": 9.0, "length/sample": 8.0, "tokens": 100,
            "time/step": 0.5}


def round_line(index):
    return {
        "round": index, "step": 20 * (index + 1), "beta": 0.1, "reference": "round_start",
        "generation": {"samples": 64, "tokens": 640, "tokens_per_second": 99.0, "truncated": 3},
        "mismatch": {"mean_abs": 0.01, "max_abs": 0.5, "kl": 0.0},
        "evaluation_before": {"nll": 2.0, "exact_match_count": 40, "num_answers": 200},
        "evaluation": {"nll": 1.5, "exact_match_count": 57, "num_answers": 200,
                       "greedy_exact_match_count": 61, "reward_accuracy": 0.8,
                       "reward_margin": 1.25, "sample_length": 12.0, "eos_rate": 0.9},
        "guard": [f"Careful <{index}>"], "time": {"generation": 3.0, "reference": 1.0,
                                                  "train": 5.0, "evaluation": 1.0, "total": 10.0},
        "examples": [{"prompt": HOSTILE, "demonstration": "d&d", "before": f"before {index}",
                      "after": f"after {index}"}],
    }


METRICS = [metric(step, (step - 1) // 20) for step in range(1, 51)]
ROUNDS = [round_line(0), round_line(1)]


class Balanced(HTMLParser):
    """Fails on a tag that is closed without being open, collects tags, urls and ids."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], set(), [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    return render_report("<i>run</i>", RECIPE, METRICS, ROUNDS)


def test_a_run_in_its_third_round(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    log = RunLog(tmp_path)
    for line in METRICS:
        log.log_metrics(line)
    for line in ROUNDS:
        log.log_round(line)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    seen = Balanced(page)
    for text in ("2 of 3", "50 of 60", "57/200", "40/200", "28.5%", "/models/tiny", "β 0.1",
                 "TP2 × PP1 + SP", "deadbeef", "torch 2.15.0", "Careful <1>", "ln 2", "1.5000",
                 "before 0", "after 1", "Engine-trainer mismatch", "Gradient norm", "20s"):
        assert text in seen.text, text
    assert page.count("<svg") == 15  # 8 over steps, 5 of evaluations, mismatch, time
    assert not list(tmp_path.glob(".*.partial"))


def test_speed_and_memory_are_drawn_where_steps_say_them():
    """On a GPU its share of the peak too; on a CPU the process's memory."""
    gpu = [line | {"train/tflops": 400.0, "train/tflops_padded": 500.0, "train/mfu": 0.4,
                   "memory/peak_allocated": 60.0, "memory/peak_reserved": 70.0}
           for line in METRICS]
    cpu = [line | {"train/tflops": 0.1, "memory/peak_process": 1.5} for line in METRICS]
    titles = [[chart.title for chart in step_charts(lines, ln2_line=False)]
              for lines in (gpu, cpu, METRICS)]
    shown = [set(found) & {"Utilisation", "Arithmetic", "Peak memory"} for found in titles]
    assert shown == [{"Utilisation", "Arithmetic", "Peak memory"}, {"Arithmetic", "Peak memory"},
                     set()]
    memory = step_charts(gpu, ln2_line=False)[titles[0].index("Peak memory")].svg
    assert "tensors" in memory and "allocator" in memory and "process" not in memory


def test_nothing_is_requested_and_texts_are_escaped(page):
    seen = Balanced(page)
    assert seen.tags.isdisjoint({"script", "iframe", "img", "object", "i"})
    assert HOSTILE in seen.text and "<i>run</i>" in seen.text
    assert not re.search(r'(src|href|xlink:href)="(?!#|data:)', page)
    assert not re.search(r"@import|url\((?!#)", page)


def test_charts_take_the_colour_of_the_page_and_share_no_ids(page):
    ids = Balanced(page).ids
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    assert "#000000" not in page and "#010203" not in page


def test_sft_shows_only_what_it_has():
    keys = ("step", "round", "loss", "grad_norm", "lr", "logp/demo", "tokens", "time/step")
    metrics = [{key: line[key] for key in keys} for line in METRICS]
    rounds = [{"round": 0, "step": 50, "evaluation_before": {"nll": 2.0},
               "evaluation": {"nll": 1.5}, "guard": [], "time": {"train": 5.0, "total": 5.0}}]
    page = Balanced(render_report("run", {"algorithm": {"name": "sft", "loss": "sigmoid"}},
                                  metrics, rounds)).text
    for absent in ("Implicit rewards", "mismatch", "Samples drawn", "exact match", "ln 2"):
        assert absent not in page
    for present in ("Loss", "Log-probability", "Held-out NLL", "NLL/token"):
        assert present in page


@pytest.mark.parametrize(("changed", "part", "marked"), [
    ({"nll_coefficient": 0.0}, {}, True),
    ({}, {"loss/margin": 0.5}, True),  # its own curve under the whole loss
    ({}, {}, False),  # the whole loss starts elsewhere
    ({"nll_coefficient": 0.0, "loss": "hinge"}, {}, False),
])
def test_ln2_is_marked_where_a_margin_loss_is_drawn(changed, part, marked):
    recipe = RECIPE | {"algorithm": RECIPE["algorithm"] | changed}
    plain = [{k: v for k, v in line.items() if k != "loss/margin"} for line in METRICS[:3]]
    page = Balanced(render_report("r", recipe, [line | part for line in plain], [])).text
    assert ("ln 2" in page) == marked
    assert ("margin loss" in page) == bool(part)


@pytest.mark.parametrize(("anchor", "preferences", "part", "marked"), [
    (0.0, [], {}, True), (0.1, [], {"loss/reward": 0.6}, True), (0.1, [], {}, False),
    (0.0, ["p.jsonl"], {}, False),
])
def test_ln2_of_rewards(anchor, preferences, part, marked):
    recipe = {"algorithm": {"name": "rft", "nll_coefficient": anchor},
              "reward": {"loss": "logistic", "preferences": preferences}}
    metrics = [{"step": s, "round": 0, "phase": "reward", "reward/loss": 1.4} | part
               for s in range(1, 4)]
    assert ("ln 2" in Balanced(render_report("r", recipe, metrics, [])).text) == marked


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert "No optimizer step" in Balanced(write_report(tmp_path).read_text()).text


def test_a_round_in_progress_is_watched_as_well():
    metrics = [metric(step, 0) | {"reward/accuracy": 1.0} for step in range(1, 21)]
    page = Balanced(render_report("run", RECIPE, metrics, [])).text
    assert "Round 0. reward/accuracy was 1 over the last 5 of 20 steps" in page


def test_rows_begin_before_training():
    assert [label for label, _ in evaluation_rows(ROUNDS)] == ["before", "round 0", "round 1"]
    without_before = [{"round": 0, "evaluation": {"nll": 1.0}}]
    assert evaluation_rows(without_before) == [("round 0", {"nll": 1.0})]
    assert evaluation_rows([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_any_key_may_be_missing_or_null(seed):
    rng = random.Random(seed)

    def damaged(value):
        if isinstance(value, dict):
            kept = {k: damaged(v) for k, v in value.items() if rng.random() > 0.3}
            return {k: None if rng.random() < 0.15 else v for k, v in kept.items()}
        return [damaged(v) for v in value] if isinstance(value, list) else value

    Balanced(render_report("run", damaged(RECIPE), damaged(METRICS[::6]), damaged(ROUNDS)))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes("a: \u00e9".encode("latin-1"))
    with pytest.raises(UserError, match="is not YAML"):
        write_report(tmp_path)


def test_rft_shows_both_phases():
    recipe = RECIPE | {
        "algorithm": {"name": "rft", "rounds": 2, "reward_steps": 3, "policy_steps": 2,
                      "beta": [0.05, 0.05], "reference": "initial"},
        "reward": {"loss": "logistic", "trunk": "joint"}, "policy": {"samples_per_prompt": 4},
    }
    metrics = [
        {"step": s, "round": s // 6, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-5, "phase": phase,
         f"{phase}/loss": 0.5, f"{phase}/{'margin' if phase == 'reward' else 'entropy'}": 1.0}
        for s, phase in enumerate(["reward", "policy"] * 5, start=1)
    ]
    rounds = [round_line(0) | {"rewards": {"demo_mean": 1.0, "sample_mean": 0.2, "sample_std": 0.4,
                                           "kl_to_reference": 0.7}}]
    rounds[0]["evaluation"] |= {"preference_accuracy": 0.75}
    page = render_report("r", recipe, metrics, rounds)
    for text in ("Policy loss", "Entropy", "KL to the reference", "Rewards after reward learning",
                 "logistic reward loss", "4 samples a prompt", "of 10", "75.0%",
                 "Held-out preferences"):
        assert text in page, text
    assert "Implicit rewards" not in page


def test_a_run_of_adapters_says_so():
    adapter = {"rank": 8, "alpha": None, "targets": ["q_proj", "v_proj"]}
    page = Balanced(render_report("r", RECIPE | {"adapter": adapter}, METRICS, ROUNDS)).text
    assert "rank 8, on q_proj, v_proj" in page
    page = Balanced(render_report("r", RECIPE | {"adapter": adapter | {"rank": None}}, [], [])).text
    assert "q_proj, v_proj" not in page.partition("Recipe")[0]
