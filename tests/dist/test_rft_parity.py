"""Reward scores, and the loss and gradient norm of reward and policy steps, on every layout."""

import numpy as np
import pytest

from tests.dist import jobs, rft_jobs
from tests.dist.layouts import LAYOUTS, SEED, SPLIT, VOCAB

NUM = 8
SGD = {"optimizer": "sgd", "sgd_momentum": 0.0, "clip_grad": 0.0}


@pytest.fixture(scope="module")
def single(pool, tiny):
    """What one process gets, by whether the embeddings are tied and the trunk's scale."""
    known = {}

    def result(tied, scale):
        if (tied, scale) not in known:
            (known[tied, scale],) = pool.run(
                1, rft_jobs.train_rft, hf=tiny[tied], layout={}, seed=SEED, optimizer=SGD,
                vocab=VOCAB, num=NUM, trunk_scale=scale,
            )
        return known[tied, scale]

    return result


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(("tied", "scale"), [(False, 0.3), (True, 1.0)])
def test_equals_one_process(pool, tiny, single, name, tied, scale):
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, rft_jobs.train_rft, hf=tiny[tied], layout=layout, seed=SEED, optimizer=SGD,
        vocab=VOCAB, num=NUM, trunk_scale=scale,
    )
    assert all(rank == ranks[0] for rank in ranks), "ranks report different numbers"
    got, expected = ranks[0], single(tied, scale)
    for key in ("before", "after"):
        spread = np.std(expected[key])
        assert spread > 0.1, "equal rewards would hide a wrong position"
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-5, atol=1e-5 * spread,
                                   err_msg=f"seed {SEED}, scores {key}")
    np.testing.assert_allclose(got["steps"], expected["steps"], rtol=1e-5, err_msg=f"seed {SEED}")
    for mine, theirs in zip(got["metrics"], expected["metrics"], strict=True):
        assert set(mine) == set(theirs)
        for key in theirs:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (SEED, key)


@pytest.mark.parametrize(("name", "tokens"), [("dp2", 90), ("pp2", 60), ("pp2_vpp2", 90)])
def test_filling_microbatches_by_tokens_changes_nothing(pool, tiny, single, name, tokens):
    """Reward, anchored and policy steps; preferences and rollouts are filled like pairs."""
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, rft_jobs.train_rft, hf=tiny[False], layout=layout, seed=SEED, optimizer=SGD,
        vocab=VOCAB, num=NUM, trunk_scale=0.3, micro_batch_tokens=tokens,
    )
    assert all(rank == ranks[0] for rank in ranks), "ranks report different numbers"
    np.testing.assert_allclose(
        ranks[0]["steps"], single(False, 0.3)["steps"], rtol=1e-5, err_msg=f"seed {SEED}"
    )


def test_the_steps_do_what_they_claim(single):
    """Otherwise equal numbers could be equal by doing nothing."""
    result = single(False, 0.3)
    assert np.abs(np.subtract(result["before"], result["after"])).min() > 0
    reward, anchored, policy = result["metrics"]
    assert {"reward/demo", "reward/margin", "reward/accuracy"} <= set(reward)
    assert {"loss/nll", "preference/accuracy"} <= set(anchored)
    assert 0 < policy["policy/clip_fraction"] < 1


@pytest.mark.parametrize("name", ["one", "tp2_sp", "pp2"])
def test_scores_and_gradient_equal_transformers(pool, tiny, name):
    """The head's own definition: w . (final hidden state at the last response token)."""
    import torch
    from transformers import AutoModel

    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, rft_jobs.train_rft, hf=tiny[False], layout=layout, seed=SEED, optimizer=SGD,
        vocab=VOCAB, num=NUM, trunk_scale=0.3,
    )
    model = AutoModel.from_pretrained(tiny[False], dtype=torch.float32)
    model.embed_tokens.padding_idx = None  # else the pad token, drawn at times, has no gradient
    weight = torch.from_numpy(rft_jobs.head_weight(SEED, model.config.hidden_size))
    weight.requires_grad_()

    def reward(prompt, response):
        ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
        hidden = model(ids).last_hidden_state[0, -1]
        scaled = 0.3 * hidden + 0.7 * hidden.detach()
        return (weight @ scaled)[0]

    pairs = jobs.make_pairs(SEED, NUM, VOCAB)
    rewards = [
        (reward(p.prompt_ids, p.demo_ids), reward(p.prompt_ids, p.sample_ids)) for p in pairs
    ]
    np.testing.assert_allclose(
        ranks[0]["before"], [demo.item() for demo, _ in rewards], rtol=1e-4, atol=1e-4
    )
    loss = torch.stack([
        -torch.nn.functional.logsigmoid(demo - sample) for demo, sample in rewards
    ]).mean()
    loss.backward()
    norm = torch.stack([
        p.grad.square().sum() for p in [weight, *model.parameters()] if p.grad is not None
    ]).sum().sqrt()
    np.testing.assert_allclose(ranks[0]["steps"][0], [loss.item(), norm.item()], rtol=1e-4)


@pytest.mark.parametrize("name", ["one", "tp2_pp2"])
@pytest.mark.parametrize(
    ("frozen", "heads", "scale", "expected"),
    [
        (None, "rewards", 1.0, (True, True)),
        ("trunk", "rewards", 0.0, (False, True)),
        ("reward_head", "logprobs", 1.0, (True, False)),
    ],
)
def test_frozen_parameters_stand_still_under_momentum(
    pool, tiny, name, frozen, heads, scale, expected
):
    world_size, layout = LAYOUTS[name]
    ranks = pool.run(
        world_size, rft_jobs.moved, hf=tiny[False], layout=layout, seed=SEED, frozen=frozen,
        heads=heads, trunk_scale=scale,
    )
    assert {trunk for trunk, _ in ranks} == {expected[0]}
    assert any(head for _, head in ranks) == expected[1]


def test_the_head_stays_fp32_in_a_bf16_model(pool, tiny):
    """A step of 0.02 on a weight of 0.1 would be rounded in bf16, and 1e-4 lost."""
    layout = {"pipeline_model_parallel_size": 2}
    first, last = pool.run(2, rft_jobs.half_precision, hf=tiny[True], layout=layout, seed=SEED)
    assert first["trunk"] == last["trunk"] == {"torch.bfloat16"}
    assert first["head"] is None and last["head"] == "torch.float32"
    assert last["moved"] == pytest.approx(2 * rft_jobs.HEAD_LR, rel=0.3)
    assert first["losses"] == last["losses"] and np.isfinite(first["losses"]).all()


@pytest.mark.parametrize("name", ["one", "pp2"])
def test_policy_steps_raise_the_reward_they_are_given(pool, tiny, name):
    """From sampling through advantages and clipped steps to other samples."""
    world_size, layout = LAYOUTS[name]
    means = pool.run(
        world_size, rft_jobs.reward_of_a_quarter, hf=tiny[False], layout=layout, seed=SEED,
        rounds=14,
    )[0]
    assert means[-1] > means[0] + 0.25, f"seed {SEED}: {means}"
