"""What is built and read once, what is saved first, and what may fail without costing a run."""

from collections import Counter

import pytest

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.run.state import RunState
from megatron_irl.storage.shared_bank import SharedBank
from tests.cli import jobs
from tests.cli.harness import deterministic, read_jsonl, run, write_recipe
from tests.cli.test_resume import Killed, kill_after, small


def fail(*_, **__):
    raise RuntimeError("a broken chart")


def test_a_report_that_fails_costs_nothing(recipe, tmp_path, monkeypatch, finished):
    """The round is saved before it is reported, and the run ends with its products."""
    monkeypatch.setattr("megatron_irl.run.recorder.write_report", fail)
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert result.err.count("report.html failed and the run goes on") == 1
    assert "a broken chart" in result.err and "Traceback" not in result.err
    assert deterministic(tmp_path / "run") == deterministic(finished)
    assert (tmp_path / "run" / "hf").is_dir()


def test_the_checkpoint_comes_before_the_report(recipe, tmp_path, monkeypatch):
    saved = []

    def look(folder):
        saved.append(sorted(p.name for p in (folder / "checkpoints").iterdir()))
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("megatron_irl.run.recorder.write_report", look)
        run("train", recipe)
    assert saved == [["step_000002"]]
    assert len(read_jsonl(tmp_path / "run" / "rounds.jsonl")) == 1


@pytest.mark.parametrize("method", ["log", "log_text", "close"])
def test_a_tracker_that_fails_costs_nothing(sections, tmp_path, monkeypatch, no_report, method):
    sections["logging"] = {"tensorboard": True}
    monkeypatch.setattr(f"megatron_irl.run.trackers.TensorBoardTracker.{method}", fail)
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    assert result.err.count("trackers failed and the run goes on") == 1
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 4


def test_a_run_killed_before_its_last_report_writes_it_when_resumed(
    recipe, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.recorder.Recorder.publish", 2, after=False)
        run("train", recipe)
    page = tmp_path / "run" / "report.html"
    before = page.stat().st_mtime_ns
    assert run("train", recipe).code == 0
    assert page.stat().st_mtime_ns > before


def test_everything_is_built_once(recipe, monkeypatch, no_report):
    """Counted where the things are made, whoever makes them."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_irl.config import load
    from megatron_irl.run.folder import RunFolder

    built = []

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            built.append((owner.__name__, name))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(load, "check_recipe")
    for kind, made in ((TransformerConfig, "__post_init__"), (OptimizerConfig, "__post_init__"),
                       (RunFolder, "__init__"), (SharedBank, "__init__")):
        count(kind, made)
    assert run("train", recipe).code == 0
    assert Counter(name for name, _ in built) == {
        "megatron_irl.config.load": 1, "TransformerConfig": 1, "OptimizerConfig": 1, "RunFolder": 1,
        "SharedBank": 3,  # the run's, the held-out one, that of earlier rounds
    }


@pytest.mark.parametrize("name", ["irft", "rft"])
def test_a_round_of_the_bank_is_read_once(sections, tmp_path, monkeypatch, no_report, name):
    """16 demonstrations in parts of 3, two rounds; held-out pairs are read by their own bank."""
    sections["algorithm"] = {"name": name, "rounds": 2, "beta": 0.1}
    if name == "rft":
        sections["algorithm"] |= {"reward_steps": 2, "policy_steps": 2}
        sections["policy"] = {"samples_per_prompt": 2}
    read, original = [], PairBank._read

    def spy(self, round, chunk, columns=None):
        read.append((self.root.name, round, chunk))
        return original(self, round, chunk, columns)

    monkeypatch.setattr(PairBank, "_read", spy)
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    assert {bank for bank, _, _ in read} == {"pairs", "heldout"}
    assert len(read) == len(set(read)), "a part was read twice"


def test_a_checkpoint_of_0_1_0_still_has_its_state():
    kept = {"step": 3, "round": 1, "step_in_round": 1, "evaluation": {"numbers": {"nll": 1.0}},
            "examples": [], "summary": {}, "seconds": {"train": 2.0}}
    state = RunState.from_dict(kept)
    assert state == RunState(3, 1, 1, {"numbers": {"nll": 1.0}}, {}, {"train": 2.0})
    assert "examples" not in state.to_dict()


def test_every_rank_brings_the_same_state_to_a_checkpoint(pool, sections, tmp_path):
    """Clocks differ by rank; a checkpoint has one state, and Megatron compares."""
    recipe = write_recipe(tmp_path / "r.yaml", **small(sections, tmp_path / "run"))
    one, other = pool.run(2, jobs.states_saved, arguments=["train", str(recipe)])
    assert len(one) == 4 and one[0]["seconds"]["train"] > 0  # in the middle of a round
    assert one == other
