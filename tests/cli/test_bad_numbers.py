"""Losses and gradients that are not finite, and losses that jump: stopped, skipped, or heeded."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_irl.run.spikes import SpikeGuard
from tests.cli import jobs
from tests.cli.harness import read_jsonl, run, write_recipe

NAN = float("nan")


def spoiled(work, kind):
    """Work whose loss is NaN, or whose loss is as ever but its gradient is not."""

    def objective(logprobs_R, batch):
        out = work.objective(logprobs_R, batch)
        if kind == "loss":
            return type(out)(out.total * NAN, out.weight, out.metrics)
        nothing = torch.sqrt(logprobs_R * 0).sum()  # 0, whose derivative is 0 times infinity
        return type(out)(out.total + nothing, out.weight, out.metrics)

    return dataclasses.replace(work, objective=objective)


def spoil(monkeypatch, kind, steps):
    """Spoil steps; returns what weights and optimizer were before and after each step."""
    from megatron_irl.run import loop

    original, seen = loop.optimizer_step, []

    def everything(running):
        parts = running.trainer.optimizer.chained_optimizers
        tensors = [p.detach() for c in running.policy.chunks for p in c.parameters()]
        tensors += jobs.tensors_of([dict(part.optimizer.state) for part in parts])
        return [tensor.clone() for tensor in tensors]

    def step(running, phase, work):
        before = everything(running)
        bad = running.state.step + 1 in steps
        try:
            original(running, phase, spoiled(work, kind) if bad else work)
        finally:
            after = everything(running)
            seen.append(len(before) == len(after) and all(
                torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    monkeypatch.setattr(loop, "optimizer_step", step)
    return seen


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skipped_steps_change_nothing(sections, tmp_path, monkeypatch, no_report, kind):
    sections["train"] |= {"on_nonfinite": "skip"}
    unchanged = spoil(monkeypatch, kind, {3})
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    assert unchanged == [False, False, True, False]
    assert "at step 3; the step is skipped" in result.err
    folder = Path(sections["output_dir"])
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, None, 1.0, None]
    assert lines[2]["grad_norm"] is None and (lines[2]["loss"] is None) == (kind == "loss")
    kept = folder / "nonfinite" / "step_000003"
    batch = json.loads((kept / "batch.json").read_text())
    assert (batch["step"], batch["round"], batch["step_in_round"]) == (3, 1, 0)
    assert len(batch["items"]) == 4
    assert all(i["kind"] == "Pair" and i["sample_ids"] and i["ordinal"] < 16
               for i in batch["items"])
    rank = json.loads((kept / "rank_00000.json").read_text())
    assert rank["rank"] == 0 and len(rank["microbatch_losses"]) == 2
    assert ("nan" in rank["microbatch_losses"]) == (kind == "loss")


def test_a_bad_gradient_stops_before_the_update(sections, tmp_path, monkeypatch, no_report):
    unchanged = spoil(monkeypatch, "gradient", {2})
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 2 and "the gradient norm is nan at step 2" in result.err
    assert unchanged == [False, True]


def test_too_many_skips(sections, tmp_path, monkeypatch, no_report):
    sections["train"] |= {"on_nonfinite": "skip", "max_skips": 1}
    spoil(monkeypatch, "loss", {1, 2})
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 2 and "after 1 skipped steps (train.max_skips=1)" in result.err


def test_every_rank_skips_when_one_loss_is_bad(pool, sections, tmp_path):
    """Two replicas, one of which finds NaN; its own file says so."""
    sections["train"] |= {"on_nonfinite": "skip"}
    sections["parallel"] = {"data_parallel_size": 2}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    for code, errors in pool.run(2, jobs.command_with_a_bad_loss, arguments=["train", str(recipe)],
                                 bad_rank=1, bad_step=2):
        assert code == 0, errors
    folder = Path(sections["output_dir"])
    assert [line.get("skipped") for line in read_jsonl(folder / "metrics.jsonl")] == [
        None, 1.0, None, None]
    losses = [json.loads(p.read_text())["microbatch_losses"]
              for p in sorted((folder / "nonfinite" / "step_000002").glob("rank_*.json"))]
    assert losses[1] == ["nan"] and losses[0] != ["nan"]


@pytest.mark.parametrize(("action", "steps", "scale"), [("halve_lr", 8, 0.5), ("end_round", 6, 1)])
def test_a_spike_is_heeded(sections, tmp_path, monkeypatch, no_report, action, steps, scale):
    """A spike after the second of four steps of the first round."""
    sections["algorithm"] |= {"steps_per_round": 4}
    sections["schedule"] = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0}
    sections["train"] |= {"on_spike": action}
    calls = []

    def feed(self, loss, phase=""):
        calls.append(loss)
        return "the loss is 9" if len(calls) == 2 else None

    monkeypatch.setattr(SpikeGuard, "feed", feed)
    result = run("train", write_recipe(tmp_path / "r.yaml", **sections))
    assert result.code == 0, result.err
    assert f"the loss is 9 (step 2; train.on_spike={action})" in result.err
    lines = read_jsonl(Path(sections["output_dir"]) / "metrics.jsonl")
    assert len(lines) == steps
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-3] * 2 + [1e-3 * scale] * (steps - 2))
    assert read_jsonl(Path(sections["output_dir"]) / "rounds.jsonl")[0]["guard"]


def test_what_a_spike_is():
    """Losses 1.0, 1.1, 0.9, ... have median 1 and a median absolute deviation of 0.1."""
    def guard():
        made = SpikeGuard(factor=6.0)
        assert [made.feed(loss) for loss in (1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.1, 0.9, 1.1, 0.9)] == (
            [None] * 10)
        return made

    assert guard().feed(1.0 + 6 * 1.4826 * 0.1 - 0.01) is None
    noticed = guard()
    said = noticed.feed(1.0 + 6 * 1.4826 * 0.1 + 0.01)
    assert said and "had 1 give or take 0.15" in said
    assert noticed.feed(50.0) is None, "said once: the guard begins anew"
    assert guard().feed(NAN) is None and guard().feed(None) is None
    assert guard().feed(50.0, "another phase") is None
