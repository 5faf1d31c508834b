"""A checkpoint of one layout continues under another as if nothing had happened."""

import numpy as np
import pytest
import torch

from megatron_irl.convert.safe_metadata import read_metadata
from tests.convert.tiny import make_tiny_llama
from tests.dist import jobs
from tests.dist.layouts import LAYOUTS, SEED, VOCAB

NUM_PAIRS = 16
ADAM = {"lr": 1e-3}


@pytest.fixture(scope="module")
def setting(pool, tmp_path_factory):
    return prepare(pool, tmp_path_factory.mktemp("checkpoint"), VOCAB)


@pytest.fixture(scope="module")
def odd_setting(pool, tmp_path_factory):
    """A vocabulary that two ranks pad and one does not."""
    return prepare(pool, tmp_path_factory.mktemp("odd"), VOCAB + 3)


@pytest.fixture(scope="module")
def sparse_setting(pool, tmp_path_factory):
    """A mixture whose every token goes to all experts: there is no choice that rounding decides."""
    return prepare(
        pool, tmp_path_factory.mktemp("sparse"), VOCAB, family="mixtral", num_local_experts=4,
        num_experts_per_tok=4,
    )


def prepare(pool, root, vocab, **model):
    """What the jobs need to find, and (loss, gradient norm) of five uninterrupted steps."""
    hf = str(make_tiny_llama(root / "hf", tied=True, seed=SEED, vocab=vocab, **model))
    common = {"hf": hf, "folder": str(root / "bank")}
    pairs = jobs.make_pairs(SEED, NUM_PAIRS, vocab)
    pool.run(1, jobs.write_bank, **common, pairs=pairs, seed=SEED, noise=3.0)
    (whole,) = pool.run(
        1, jobs.train_on_bank, **common, layout={}, optimizer=ADAM, steps=5
    )
    return common, np.array(whole)


def interrupted(pool, common, folder, saved, resumed, optimizer=ADAM):
    """The same five steps: three, a checkpoint, and two under another layout."""
    ranks, layout = LAYOUTS[saved]
    before = pool.run(
        ranks, jobs.train_and_save, **common, layout=layout, optimizer=optimizer, steps=3,
        out=str(folder),
    )[0]
    ranks, layout = LAYOUTS[resumed]
    after = pool.run(
        ranks, jobs.resume_and_train, **common, layout=layout, optimizer=optimizer, steps=2,
        out=str(folder), at=3,
    )[0]
    return np.array([*before, *after])


def assert_same_training(got, whole):
    """Within test_parity's bounds for Adam; a lost moment or step count is off by percents."""
    difference = np.abs(got - whole) / whole
    assert difference[:, 0].max() < 3e-4, f"seed {SEED}: {difference[:, 0]}"
    assert difference[:, 1].max() < 5e-3, f"seed {SEED}: {difference[:, 1]}"


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("one", "one"), ("one", "tp2_pp2"), ("tp2", "pp2"), ("pp2_vpp2", "dp2"), ("dp2", "one"),
     ("tp2_sp", "tp2_sp")],
)
def test_resumed_under_another_layout(pool, setting, tmp_path, saved, resumed):
    common, whole = setting
    got = interrupted(pool, common, tmp_path, saved, resumed)
    if saved == resumed == "one":
        assert (got == whole).all(), "same layout: bit for bit"
    assert_same_training(got, whole)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("saved", "resumed"), [("one", "one"), ("dp2", "dp2"), ("tp2", "dp2"), ("dp2", "one")]
)
def test_few_bytes_resume_as_they_are(pool, setting, tmp_path, saved, resumed, moments):
    """What bf16 weights lack of their float32 copies, and bf16 moments, under any layout."""
    common = setting[0]
    optimizer = {"lr": 1e-3, "bf16": True, "use_precision_aware_optimizer": True,
                 "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    ranks, layout = LAYOUTS[saved]
    whole = np.array(pool.run(
        ranks, jobs.train_on_bank, **common, layout=layout, optimizer=optimizer, steps=5,
    )[0])
    got = interrupted(pool, common, tmp_path, saved, resumed, optimizer)
    if saved == resumed:
        assert (got == whole).all(), "same layout: bit for bit"
    # bf16 products differ by layout; a lost moment shows as ten times as much.
    assert (np.abs(got - whole) / whole)[:, 0].max() < 3e-3, f"seed {SEED}: {got} {whole}"
    stored = read_metadata(tmp_path / "step_000003").state_dict_metadata
    dtypes = {name.split(".")[2]: entry.properties.dtype for name, entry in stored.items()
              if name.startswith("optimizer.state.")}
    assert dtypes == {"param": torch.int16, "exp_avg": moments, "exp_avg_sq": moments}


@pytest.mark.parametrize(
    ("saved", "resumed"), [("tp2", "one"), ("one", "tp2"), ("tp2_pp2", "dp2"), ("tp2", "tp2")]
)
def test_padded_vocabulary_resumes_under_another_layout(
    pool, odd_setting, tmp_path, saved, resumed
):
    common, whole = odd_setting
    assert_same_training(interrupted(pool, common, tmp_path, saved, resumed), whole)


@pytest.mark.parametrize(("saved", "resumed"), [
    ("tp2_sp", "tp2_ep2"), ("tp2_ep2", "pp2"), ("tp2_ep2_dp2", "tp2_ep2"),
])
def test_experts_resume_under_another_layout(pool, sparse_setting, tmp_path, saved, resumed):
    """Experts that are whole on a rank have an optimizer of their own, others have not."""
    common, whole = sparse_setting
    assert_same_training(interrupted(pool, common, tmp_path, saved, resumed), whole)


def test_an_optimizer_that_cannot_change_its_parts(pool, sparse_setting, tmp_path):
    sgd = {"optimizer": "sgd", "lr": 1e-2, "sgd_momentum": 0.9}
    with pytest.raises(RuntimeError, match="goes on under another parallel.expert_model_parallel"):
        interrupted(pool, sparse_setting[0], tmp_path, "tp2_ep2", "tp2_sp", sgd)


def test_lost_optimizer_state_would_show(pool, setting, tmp_path):
    """The bounds above tell a resumed optimizer from a fresh one."""
    common, whole = setting
    pool.run(1, jobs.train_and_save, **common, layout={}, optimizer=ADAM, steps=3,
             out=str(tmp_path))
    (after,) = pool.run(
        1, jobs.resume_and_train, **common, layout={}, optimizer=ADAM, steps=2, out=str(tmp_path),
        at=3, forget=True,
    )
    difference = np.abs(np.array(after) - whole[3:]) / whole[3:]
    assert difference[1].max() > 5e-3


@pytest.mark.parametrize(("optimizer", "bound"), [
    (ADAM, 3e-4), ({"optimizer": "sgd", "lr": 1e-2, "sgd_momentum": 0.9}, 1e-5),
    ({"optimizer": "sgd", "lr": 1e-2, "sgd_momentum": 0.0}, 1e-5),
], ids=["adam", "sgd", "sgd without momentum"])
def test_one_run_under_one_layout_after_another(pool, setting, tmp_path, optimizer, bound):
    """TP2, PP2, DP2 and back, a step each; every one saves while it takes a step that is lost."""
    common = setting[0]
    (whole,) = pool.run(1, jobs.train_on_bank, **common, layout={}, optimizer=optimizer, steps=4)
    ranks, layout = LAYOUTS["tp2"]
    got = pool.run(
        ranks, jobs.train_and_save, **common, layout=layout, optimizer=optimizer, steps=1,
        out=str(tmp_path),
    )[0]
    for at, name in enumerate(("pp2", "dp2", "tp2"), 1):
        ranks, layout = LAYOUTS[name]
        got += pool.run(
            ranks, jobs.resume_and_train, **common, layout=layout, optimizer=optimizer, steps=1,
            out=str(tmp_path), at=at, save=True,
        )[0]
    losses, expected = np.array(got)[:, 0], np.array(whole)[:, 0]
    assert (np.abs(losses - expected) / expected).max() < bound, (losses, expected)
