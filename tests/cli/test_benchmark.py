"""The benchmark command: phases, baseline, sweep and peer on a tiny model of random weights."""

import json

import pytest

from tests.cli.harness import refused, run, write_recipe


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


@pytest.mark.slow
def test_peer_and_sweep(bench, capsys):
    """Ours and the peer's in processes of their own; a ratio for each phase and for the round."""
    result = run(*bench, "--peer", "trl", "--sweep", "train.micro_batch_size=2")
    assert result.code == 0, result.err
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [r["phase"] for r in results] == ["generate", "reference", "train", "round"]
    for one in results:
        assert one["ratio"] == pytest.approx(one["peer_seconds"] / one["seconds"])
        assert one["memory_ratio"] > 0
    assert results[0]["train.micro_batch_size"] == "2"
    assert results[3]["seconds"] == pytest.approx(sum(r["seconds"] for r in results[:3]))


@pytest.mark.parametrize(("more", "named"), [
    (["--lengths", "8"], ("--lengths 8", "PROMPT,RESPONSE")),
    (["--lengths", "9-8,4"], ("9-8",)),
    (["--steps", "0"], ("--steps 0",)),
    (["--baseline", "nowhere.json"], ("--baseline nowhere.json", "does not exist")),
    (["--sweep", "micro"], ("--sweep micro", "key=a,b,c")),
    (["model.hf=nowhere"], ("model.hf=nowhere",)),
])
def test_wrong_input(bench, more, named):
    refused(*bench, *more, named=named)


def test_the_recorded_cases_are_written_as_results_are():
    """A case of the H100's baseline is found again by the name that a result gets."""
    from megatron_irl.bench.baseline import falls, read_baseline
    from tests.planning.cases import ROOT_BASELINE

    entries = read_baseline(ROOT_BASELINE)
    assert len(entries) == len({e["case"] for e in entries}) >= 8
    slow = [{"case": e["case"], "tokens_per_second": 0.89 * e["tokens_per_second"]}
            for e in entries]
    assert len(falls(slow, entries)) == len(entries)
    assert falls([s | {"tokens_per_second": 2e9} for s in slow], entries) == []


def test_ranks_save_into_one_folder(bench):
    result = run(*bench, "--phase", "save", "parallel.data_parallel_size=2")
    assert result.code == 0, result.err
