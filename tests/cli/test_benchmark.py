"""The benchmark command: phases, baseline, sweep and peer on a tiny model of random weights."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from megatron_irl import cli
from megatron_irl.bench.baseline import falls, read_baseline
from megatron_irl.bench.generation import budgets_of
from megatron_irl.bench.work import Range
from megatron_irl.cli.benchmark import case_name, case_of, recipe_of
from megatron_irl.convert.hf_config import architecture, read_hf_config
from megatron_irl.flops import layer_parameters
from megatron_irl.planning.machines import MACHINES
from megatron_irl.policy.policy import Policy
from tests.cli.harness import refused, run, write_recipe
from tests.planning.cases import ROOT_BASELINE

ROOT = Path(__file__).parents[2]
VOCAB = 128  # of the tiny model


@pytest.fixture
def bench(sections, tmp_path):
    """Arguments of a quick benchmark; of the model there is nothing but its config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    source = sections["model"]["hf"]
    (folder / "config.json").write_text(open(f"{source}/config.json").read())
    sections["model"] = {"hf": str(folder)}
    path = write_recipe(tmp_path / "recipe.yaml", **sections)
    return ["benchmark", path, "--random-weights", "--lengths", "8-12,4-6", "--requests", "4",
            "--steps", "1", "--warmup", "1"]


def test_phases_and_baseline(bench, tmp_path, capsys):
    result = run(*bench, "--phase", "all", "--plot", tmp_path / "speed.svg")
    assert result.code == 0, result.err
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [r["phase"] for r in results] == ["generate", "reference", "train", "save"]
    generate, reference, train, save = results
    assert generate["tokens_per_second"] * generate["seconds"] == pytest.approx(4 * 6)
    assert 0 < generate["prefill_seconds"] < generate["seconds"]
    assert train["train/tflops"] > 0 and reference["seconds"] > 0 and save["bytes"] > 10_000
    assert "tokens a second" in (tmp_path / "speed.svg").read_text()
    baseline = tmp_path / "baseline.json"
    for factor, warned in ((1000, True), (0.001, False)):
        entry = train | {"tokens_per_second": factor * train["tokens_per_second"]}
        baseline.write_text(json.dumps({"results": [entry]}))
        again = run(*bench, "--phase", "train", "--baseline", baseline)
        assert again.code == 0
        assert ("WARNING: train LlamaForCausalLM" in again.err) == warned


def test_ragged_budgets_and_what_a_decode_step_reads(bench, capsys, monkeypatch):
    """Of a queue of 5 at 2 places: the longest budgets are worked off in 3 turns of 5 steps.

    By hand, in fp32: a step reads 2 layers of 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 weights,
    a head of 32 * 128, and for 2 requests the keys and values of 16 numbers each of 2 layers, of
    the prompt and half the response.
    """
    monkeypatch.setattr("megatron_irl.run.speed.known_machine", lambda: MACHINES["h100"])
    # What a GPU tells of the two calls since it was asked last.
    monkeypatch.setattr(Policy, "generation_costs", lambda _: {"host_seconds": 0.25})
    result = run(*bench, "--phase", "generate", "--lengths", "8,2-6", "--ragged", "--requests",
                 "5", "generation.max_requests=2")
    assert result.code == 0, result.err
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert found["decode_step_seconds"] == pytest.approx(
        (found["seconds"] - found["prefill_seconds"]) / (3 * 5))
    read = 4 * (2 * (32 * 64 + 32 * 32 + 3 * 32 * 64) + 32 * VOCAB + 2 * 2 * 16 * 2 * (8 + 3))
    assert found["decode_bandwidth_utilisation"] == pytest.approx(
        read / 3.35e12 / found["decode_step_seconds"])
    assert found["ragged_to_equal"] == pytest.approx(
        found["ragged_tokens_per_second"] / found["equal_tokens_per_second"])
    assert found["host_share"] == pytest.approx(0.25 / 2 / found["seconds"])
    assert found["ragged_host_share"] == pytest.approx(
        0.25 / 2 / (20 / found["ragged_tokens_per_second"]))


@pytest.mark.parametrize("requests", [1, 6, 7])
@pytest.mark.parametrize("response", [Range(3, 8), Range(4, 8)])
def test_budgets_of_the_same_sum(requests, response):
    equal, unequal = budgets_of(response, requests)
    assert len(equal) == len(unequal) == requests and sum(equal) == sum(unequal)
    assert max(equal) - min(equal) <= 1
    assert all(response.low <= n <= response.high for n in unequal)
    assert requests < 6 or len(set(unequal)) > 2


@pytest.mark.slow
def test_peer_and_sweep(bench, tmp_path, capsys):
    """Ours and the peer's in processes of their own; a ratio for each phase and for the round."""
    case = "generate LlamaForCausalLM 2x32 fp32 tp1 pp1 2 requests 8-12,4-6"
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"results": [{"case": case, "tokens_per_second": 1e9}]}))
    result = run(*bench, "--peer", "trl", "--sweep=requests,generation.max_requests=2",
                 "--baseline", baseline)
    assert result.code == 0, result.err
    assert f"WARNING: {case}: " in result.err
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [r["phase"] for r in results] == ["generate", "reference", "train", "round"]
    for one in results:
        assert one["ratio"] == pytest.approx(one["peer_seconds"] / one["seconds"])
        assert one["memory_ratio"] > 0
    assert results[0]["requests"] == 2 and results[0]["generation.max_requests"] == "2"
    assert results[3]["seconds"] == pytest.approx(sum(r["seconds"] for r in results[:3]))


@pytest.mark.parametrize(("more", "named"), [
    (["--lengths", "8"], ("--lengths 8", "PROMPT,RESPONSE")),
    (["--lengths", "9-8,4"], ("9-8",)),
    (["--steps", "0"], ("--steps 0",)),
    (["--baseline", "nowhere.json"], ("--baseline nowhere.json", "does not exist")),
    (["--sweep", "micro"], ("--sweep micro", "key=a,b,c")),
    (["--ragged", "--lengths", "8,6"], ("--ragged", "--lengths 8,6", "256,64-192")),
    (["--ragged", "--phase", "train"], ("--ragged", "--phase train", "--phase generate")),
    (["model.hf=nowhere"], ("model.hf=nowhere",)),
])
def test_wrong_input(bench, more, named):
    refused(*bench, *more, named=named)


def test_the_recorded_cases_are_written_as_results_are():
    """A case of the H100's baseline is found again by the name that a result gets."""
    entries = read_baseline(ROOT_BASELINE)
    assert len(entries) == len({e["case"] for e in entries}) >= 8
    slow = [{"case": e["case"], "tokens_per_second": 0.89 * e["tokens_per_second"]}
            for e in entries]
    assert len(falls(slow, entries)) == len(entries)
    assert falls([s | {"tokens_per_second": 2e9} for s in slow], entries) == []
    # Values of a sweep that the case does not name are no falls; rounds and saves have no speed.
    assert falls([*slow[:1], *slow[:1]], entries) == []
    assert falls([{"phase": "round"}, {"case": "save"}], [{"phase": "round"}, *entries]) == []


@pytest.mark.parametrize(("name", "parameters"), [
    ("llama-20m", 20e6), ("llama-200m", 200e6), ("llama-1.1b", 1.1e9), ("llama-2.8b", 2.8e9),
    ("llama-8b", 8.03e9),
])
def test_shapes_have_as_many_parameters_as_their_names_say(name, parameters):
    arch = architecture(read_hf_config(ROOT / "benchmarks" / name))
    ends = 2 * arch.vocab_size * arch.dims["hidden"]
    found = arch.transformer["num_layers"] * layer_parameters(arch) + ends
    assert found == pytest.approx(parameters, rel=0.03)


def test_the_runs_of_the_gpu_are_those_of_its_baseline():
    """Each is a command that is accepted, and together they measure every recorded case."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "benchmark_gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    names = set()
    for shape, rest in gpu.RUNS:
        options = cli._parse(gpu.command(shape, rest))
        keys, _, values = (options.sweep or "requests=64").partition("=")
        for value in values.split(","):
            more = [f"{key}={value}" for key in keys.split(",") if key != "requests"]
            if "requests" in keys and options.sweep:
                options.requests = int(value)
            case = case_of(options, recipe_of(options, more), check_hardware=False)
            names.add(case_name(*case, options.phase))
    recorded = {entry["case"] for entry in read_baseline(ROOT_BASELINE)}
    assert recorded <= names
    eager = {name for name in names if "graphs off 64 requests" in name}
    assert len(eager) == 1 and not eager & recorded


@pytest.mark.parametrize(("override", "batch"), [
    ("algorithm.name=sft", "2 of 4 sequences"), ("seed=3", "2 of 4 pairs")])
def test_a_case_names_what_a_batch_is_of(bench, sections, override, batch):
    command, path, *rest = bench
    sections["algorithm"] = {"name": "irft", "rounds": 1}
    write_recipe(path, **sections)
    options = cli._parse([command, str(path), override, *rest, "--phase", "train"])
    assert f" {batch} " in case_name(*case_of(options, recipe_of(options)), "train")


def test_ranks_save_into_one_folder(bench, tmp_path, zygote):
    command = zygote.start([*bench, "--phase", "save", "parallel.data_parallel_size=2"],
                           cwd=str(tmp_path), log=str(tmp_path / "log"), env=dict(os.environ))
    assert command.wait(timeout=300) == 0, command.said
