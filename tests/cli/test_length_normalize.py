"""A run that trained on rewards per token is judged and scored by rewards per token."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_irl.data.pair_bank import PairBank
from megatron_irl.data.pair_index import usable_pairs
from tests.cli.conftest import small_recipe
from tests.cli.harness import read_jsonl, run, write_jsonl, write_recipe

BETA = 0.1  # of the small recipe
ANSWERS = ["3", "a longer one"]  # 2 and 13 tokens with EOS


@pytest.fixture(scope="module")
def root(model, data, tmp_path_factory):
    """A finished run of one round with ``length_normalize``, its preferences beside it."""
    folder = tmp_path_factory.mktemp("per_token")
    preferences = [{"prompt": f"{a}+2", "chosen": str(a + 2), "rejected": "x" * (1 + 2 * a)}
                   for a in range(3)]
    mapping = small_recipe(model, data, folder / "run")
    mapping["data"]["eval_preferences"] = str(write_jsonl(folder / "eval.jsonl", preferences))
    mapping["algorithm"] |= {"rounds": 1, "length_normalize": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_irl.run.recorder.write_report", lambda folder: folder)
        result = run("train", write_recipe(folder / "r.yaml", **mapping))
    assert result.code == 0, result.err
    return folder


def scored(tmp_path, records, *options):
    pairs = write_jsonl(tmp_path / "p.jsonl", records)
    result = run("score", "--pairs", pairs, "--out", tmp_path / "o.jsonl", "--overwrite",
                 *options)
    assert result.code == 0, result.err
    return np.array([line["rewards"] for line in read_jsonl(tmp_path / "o.jsonl")])


def test_score_divides_by_the_length_of_the_response(root, model, tmp_path):
    records = [{"prompt": f"{a}+1", "responses": ANSWERS} for a in range(3)]
    whole = scored(tmp_path, records, "--model", root / "run" / "hf", "--reference", model,
                   "--beta", BETA)  # an HF folder does not say how it was trained
    per_token = scored(tmp_path, records, "--model", root / "run")
    np.testing.assert_allclose(per_token, whole / np.array([2, 13]), rtol=1e-4, atol=1e-7)
    assert np.abs(whole).min() > 1e-4


def test_heldout_preferences_are_judged_by_the_reward_that_score_gives(root, tmp_path):
    records = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]}
               for r in read_jsonl(root / "eval.jsonl")]
    rewards = scored(tmp_path, records, "--model", root / "run")
    (line,) = read_jsonl(root / "run" / "rounds.jsonl")
    margins = rewards[:, 0] - rewards[:, 1]
    assert line["evaluation"]["preference_margin"] == pytest.approx(margins.mean(), abs=1e-6)
    assert line["evaluation"]["preference_accuracy"] == np.mean(margins > 0)
    assert np.abs(margins).max() > 1e-4


def test_heldout_pairs_are_judged_per_token(root):
    """Against transformers, on the very ids of the held-out bank."""
    policy = AutoModelForCausalLM.from_pretrained(root / "run" / "hf", dtype=torch.float32)

    def logp(prompt, response):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            rows = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return rows.gather(1, ids[0, len(prompt) :, None]).sum().item()

    pairs = usable_pairs(PairBank(root / "run" / "heldout").read_round(0))
    margins = np.array([
        BETA * ((logp(p.prompt_ids, p.demo_ids) - p.ref_demo_logp) / len(p.demo_ids)
                - (logp(p.prompt_ids, p.sample_ids) - p.ref_sample_logp) / len(p.sample_ids))
        for p in pairs
    ])
    assert len({len(p.demo_ids) for p in pairs} | {len(p.sample_ids) for p in pairs}) > 1
    (line,) = read_jsonl(root / "run" / "rounds.jsonl")
    assert line["evaluation"]["reward_margin"] == pytest.approx(margins.mean(), abs=1e-6)
    assert line["evaluation"]["reward_accuracy"] == np.mean(margins > 0)
