"""``evaluate``: a run and what it started from, side by side."""

import importlib.util
import json
import math
import re

import pytest
import yaml

from tests.cli import jobs
from tests.cli.conftest import small_recipe
from tests.cli.harness import read_jsonl, refused, run, write_jsonl, write_recipe

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra: pip install lm-eval")


def tiny_tasks(folder):
    """A task of each request type, over one local file of sums; a group of two of them."""
    data = write_jsonl(folder / "sums.jsonl", [
        {"question": f"{a}+{b}", "answer": str(a + b), "choices": [str(a + b), "x", str(a - b)]}
        for a, b in ((1, 2), (3, 4), (5, 5), (9, 1))])
    common = {
        "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "num_fewshot": 0,
        "doc_to_text": "{{question}}=", "doc_to_target": "{{answer}}", "metadata": {"version": 1},
    }
    kinds = {
        "tiny_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
                        "doc_to_target": 0, "num_fewshot": None,
                        "metric_list": [{"metric": "acc", "aggregation": "mean",
                                         "higher_is_better": True}]},
        "tiny_last": {"output_type": "loglikelihood",
                      "metric_list": [{"metric": "perplexity", "aggregation": "perplexity",
                                       "higher_is_better": False},
                                      {"metric": "acc", "aggregation": "mean",
                                       "higher_is_better": True}]},
        "tiny_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                      "doc_to_target": "{{question}} is {{answer}}",
                      "metric_list": [{"metric": "byte_perplexity",
                                       "aggregation": "weighted_perplexity",
                                       "higher_is_better": False}]},
        "tiny_answer": {"output_type": "generate_until",
                        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
                        "metric_list": [{"metric": "exact_match", "aggregation": "mean",
                                         "higher_is_better": True}]},
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | {"task": name} | kind))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({
        "group": "tiny", "task": ["tiny_choice", "tiny_last"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}))
    return folder


def rows_of(path):
    return {(row["of"], row["metric"]): row for row in json.loads(path.read_text())["rows"]}


@pytest.fixture(scope="module")
def explicit(model, data, tmp_path_factory):
    """A run with adapters whose reward is explicit."""
    root = tmp_path_factory.mktemp("explicit")
    mapping = small_recipe(model, data, root / "run")
    mapping["adapter"] = {"rank": 2}
    mapping["algorithm"] = {"name": "rft", "rounds": 1, "reward_steps": 1, "policy_steps": 1}
    result = run("train", write_recipe(root / "recipe.yaml", **mapping))
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture
def sets(tmp_path):
    """A file of each kind of the user's own sets."""
    return {
        "harmful": write_jsonl(tmp_path / "harmful.jsonl", [
            {"prompt": "1+1"}, {"messages": [{"role": "user", "content": "2+2"}]}]),
        "stereotypes": write_jsonl(tmp_path / "pairs.jsonl", [
            {"sent_more": "A is bad", "sent_less": "B is bad", "bias_type": "letters"},
            {"sent_more": "1 is odd", "sent_less": "2 is odd", "bias_type": "digits"}]),
        "preferences": write_jsonl(tmp_path / "preferences.jsonl", [
            {"prompt": "1+1=", "chosen": "2", "rejected": "33"},
            {"prompt": "1+2=", "chosen": "3 yes", "rejected": "4"}]),
    }


def test_a_run_beside_its_start_on_sets_of_ones_own(finished, model, sets, tmp_path, capsys):
    out = tmp_path / "found.json"
    command = ["evaluate", "--model", finished, "--out", out, "--max-new-tokens", 5]
    for name, path in sets.items():
        command += [f"--{name}", path]
    toxic = ["--toxicity", "tests.cli.jobs:share_of_digits", "--toxicity-prompts", sets["harmful"]]
    result = run(*command, *toxic)
    assert result.code == 0, result.err
    rows = rows_of(out)
    assert rows["stereotypes", "stereotype likelier"]["count"] == 2
    assert rows["stereotypes/digits", "stereotype likelier"]["before"] in (0, 0.5, 1)
    assert rows["harmful", "refusal rate"]["after"] == 0  # six bytes are no refusal
    assert rows["harmful", "refusal rate"]["after_interval"] == pytest.approx([0, 0.6576], abs=5e-5)
    assert rows["toxicity", "mean score"]["before"] is not None
    assert rows["toxicity", "mean score"]["after_interval"] is None
    assert rows["preferences", "accuracy"]["before"] is None, "the start has no reward"
    shown = capsys.readouterr().out
    assert re.search(r"\d better, \d worse", shown) and "calibration error" in shown
    answers = read_jsonl(tmp_path / "found.answers.jsonl")
    assert [line["set"] for line in answers] == ["harmful"] * 2 + ["toxicity_prompts"] * 2
    assert all(isinstance(line["before"], str) for line in answers)

    # The reward is what ``score`` says it is, and "before" is what the start itself gives.
    run("score", "--model", finished, "--pairs", sets["preferences"], "--out", tmp_path / "s.jsonl")
    scored = [line["rewards"] for line in read_jsonl(tmp_path / "s.jsonl")]
    margins = [chosen - rejected for chosen, rejected in scored]
    assert rows["preferences", "margin"]["after"] == pytest.approx(sum(margins) / 2, abs=1e-6)
    start = tmp_path / "start.json"
    alone = run("evaluate", "--model", model, "--stereotypes", sets["stereotypes"], "--out", start)
    assert alone.code == 0, alone.err
    name = "stereotypes/digits", "stereotype likelier"
    assert rows_of(start)[name]["after"] == rows[name]["before"]
    assert rows_of(start)[name]["before"] is None
    refused(*command, named=("exists already", "--overwrite"))


def test_an_explicit_reward_on_preferences(explicit, sets, tmp_path):
    out = tmp_path / "found.json"
    result = run("evaluate", "--model", explicit, "--preferences", sets["preferences"],
                 "--out", out, "--before", "none")
    assert result.code == 0, result.err
    run("score", "--model", explicit, "--pairs", sets["preferences"], "--out", tmp_path / "s.jsonl")
    margins = [a - b for a, b in (line["rewards"] for line in read_jsonl(tmp_path / "s.jsonl"))]
    margin = rows_of(out)["preferences", "margin"]["after"]
    assert margin == pytest.approx(sum(margins) / 2, abs=1e-6)
    refused("evaluate", "--model", explicit, "--preferences", sets["preferences"], "--beta", 1,
            named=("--beta", "explicit"))


@needs_lm_eval
def test_tasks_of_every_request_type(finished, model, tmp_path, no_report):
    tasks = tiny_tasks(tmp_path)
    command = ["evaluate", "--model", finished, "--include-path", tasks, "--offline", "--tasks"]
    result = run(*command, "tiny,tiny_text,tiny_answer", "--log-samples", "--num-fewshot", 1)
    assert result.code == 0, result.err
    written = [path for path in (finished / "evaluation").glob("*.json")]
    assert len(written) == 1 and written[0].name.startswith("tiny-tiny-text-tiny-answer-")
    rows = rows_of(written[0])
    assert set(rows) == {("tiny", "acc"), ("tiny_text", "byte_perplexity"),
                         ("tiny_answer", "exact_match")}
    found = json.loads(written[0].read_text())
    assert found["weights"] and found["settings"]["before"] == str(model)
    shots = found["lm_eval"]["after"]["n-shot"]
    assert shots["tiny_choice"] == 1 and shots["tiny_answer"] == 0, "a task's own 0 stays"
    assert rows["tiny", "acc"]["count"] == 8 and rows["tiny", "acc"]["change_stderr"] is not None
    assert rows["tiny", "acc"]["after_interval"] and not rows["tiny_text", "byte_perplexity"][
        "after_interval"]
    samples = read_jsonl(written[0].with_suffix(".samples.jsonl"))
    assert len(samples) == 2 * 4 * 4
    prompts = {side: [s["arguments"] for s in samples if s["of"] == side]
               for side in ("before", "after")}
    assert prompts["before"] == prompts["after"], "both models are shown the same examples"

    # Against lm-eval's own adapter of transformers, on the weights before.
    from lm_eval.models.huggingface import HFLM

    from megatron_irl.evaluation.harness import TaskOptions, load_tasks, run_tasks

    options = TaskOptions(("tiny", "tiny_text", "tiny_answer"), tasks, num_fewshot=1)
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=2)
    expected = run_tasks(theirs, load_tasks(options), options)
    for task in ("tiny_choice", "tiny_last", "tiny_text", "tiny_answer"):
        ours = [s for s in samples if s["of"] == "before" and s["task"] == task]
        for mine, right in zip(ours, expected["samples"][task], strict=True):
            assert [a for a, *_ in mine["arguments"]] == [a for a, *_ in right["arguments"]]
            for a, b in zip(flat(mine["resps"]), flat(right["resps"]), strict=True):
                assert a == b if isinstance(a, str | bool) else math.isclose(a, b, abs_tol=1e-4)


def flat(value):
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, list | tuple) else [
        value]


@needs_lm_eval
def test_the_report_shows_what_got_better(finished, tmp_path):
    result = run("evaluate", "--model", finished, "--include-path", tiny_tasks(tmp_path),
                 "--tasks", "tiny_choice", "--apply-chat-template", "--fewshot-as-multiturn",
                 "--num-fewshot", 2, "--system", "You add.", "--log-samples")
    assert result.code == 0, result.err
    page = (finished / "report.html").read_text()
    assert "Before and after: tiny-choice-" in page and "tiny_choice" in page
    samples = next((finished / "evaluation").glob("tiny-choice-*.samples.jsonl"))
    prompt = read_jsonl(samples)[0]["arguments"][0][0]
    assert prompt.count("<|im_start|>user") == 3 and prompt.endswith("<|im_start|>assistant\n")
    assert prompt.startswith("<|im_start|>system\nYou add.<|im_end|>")


@needs_lm_eval
def test_tasks_that_cannot_be_run_are_refused_before_weights_are_read(finished, tmp_path):
    tasks = tiny_tasks(tmp_path)
    command = ["evaluate", "--model", finished, "--offline"]
    included = [*command, "--include-path", tasks, "--tasks"]
    refused(*included, "tiny_choise", named=("tiny_choise", "tiny_choice", "--include-path"))
    broken = yaml.safe_load((tasks / "tiny_text.yaml").read_text()) | {
        "task": "tiny_gone", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}}}
    (tasks / "tiny_gone.yaml").write_text(yaml.safe_dump(broken))
    refused(*included, "tiny_gone", named=("tiny_gone cannot be loaded", "--offline"))
    unsafe = broken | {"task": "tiny_unsafe", "unsafe_code": True} | {
        "dataset_kwargs": yaml.safe_load((tasks / "tiny_text.yaml").read_text())["dataset_kwargs"]}
    (tasks / "tiny_unsafe.yaml").write_text(yaml.safe_dump(unsafe))
    refused(*included, "tiny_unsafe", named=("tiny_unsafe runs code",))
    refused(*included, "paper", "--num-fewshot", 3, named=("--num-fewshot 3", "arc_challenge"))


def test_commands_that_make_no_sense_are_refused(finished, model, sets, tmp_path, monkeypatch):
    command = ["evaluate", "--model", finished]
    harmful = ["--harmful", sets["harmful"]]
    refused(*command, named=("nothing to evaluate", "--tasks"))
    refused(*command, *harmful, "--limit", 3, named=("--limit is about --tasks",))
    refused(*command, *harmful, "--system", "x", named=("--system needs --apply-chat-template",))
    refused(*command, *harmful, "--max-new-tokens", 0, named=("--max-new-tokens 0",))
    refused(*command, "--harmful", tmp_path / "no.jsonl", named=("no.jsonl",))
    refused(*command, "--stereotypes", sets["harmful"], named=("harmful.jsonl:1", "sent_more"))
    refused(*command, *harmful, "--before", tmp_path, named=("--before", "config.json"))
    refused("evaluate", "--model", model, *harmful, named=("--out",))
    toxic = ["--toxicity-prompts", sets["harmful"], "--toxicity"]
    refused(*command, *toxic, "nowhere:f", named=("nowhere:f cannot be imported",))
    refused(*command, *toxic[:2], named=("--toxicity-prompts needs --toxicity",))
    refused(*command, *toxic, "tests.cli.jobs:wrong_scores", "--max-new-tokens", 2,
            "--before", "none", named=("2 numbers in [0, 1]",))
    refused("evaluate", "--model", model, "--preferences", sets["preferences"], "--out",
            tmp_path / "o.json", named=("carries no reward",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(*command, "--tasks", "paper", named=("pip install 'megatron-irl[lm-eval]'",))


def test_two_ranks_find_what_one_does(pool, model, sets, tmp_path):
    command = ["evaluate", "--model", str(model), "--before", str(model), "--max-new-tokens", "4",
               "--stereotypes", str(sets["stereotypes"]), "--harmful", str(sets["harmful"])]
    if importlib.util.find_spec("lm_eval") is not None:
        command += ["--include-path", str(tiny_tasks(tmp_path)), "--tasks", "tiny_text,tiny_answer"]
    found = []
    for name, size, layout in (("one", 1, []), ("two", 2, ["--tensor-model-parallel-size", "2"])):
        out = tmp_path / f"{name}.json"
        for code, err in pool.run(size, jobs.command, arguments=[*command, *layout, "--out",
                                                                 str(out)]):
            assert code == 0, err
        found.append(rows_of(out))
    one, two = found
    assert set(one) == set(two)
    for key, row in one.items():
        assert two[key]["after"] == pytest.approx(row["after"], rel=1e-5)
        assert row["verdict"] == two[key]["verdict"] == "same"
