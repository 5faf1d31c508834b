"""What ranks must agree on, they agree on: results and errors, folder, bank and weights."""

import pytest

from tests.convert.tiny import make_tiny_llama
from tests.dist import shared_jobs


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("shared") / "hf", layers=2))


def test_results_and_errors_reach_every_rank(pool):
    first, second = pool.run(2, shared_jobs.outcomes)
    assert first["result"] == second["result"] == "of rank 0"
    assert first["user's"] == ("UserError", "from rank 0", False)
    assert second["user's"] == ("UserError", "from rank 0", True)  # rank 0 prints it
    assert first["other"][:2] == ("KeyError", "'from rank 0'")
    assert second["other"][:2] == ("AnotherRankFailed", "rank 0 failed: KeyError: 'from rank 0'")
    assert (first["everywhere"], second["everywhere"]) == (0, 1)
    assert first["on one"] == ("UserError", "from rank 1", True)
    assert second["on one"] == ("UserError", "from rank 1", False)
    assert first["other on one"][:2] == (
        "AnotherRankFailed", "rank 1 failed: ZeroDivisionError: from rank 1")
    assert second["other on one"][0] == "ZeroDivisionError"
    assert first["largest"] == second["largest"] == {"both": 1.0, "of 0": 7.0, "of 1": 7.0}


def test_a_folder_that_ranks_do_not_share_is_refused(pool, tmp_path):
    folders = [str(tmp_path / name) for name in ("here", "there")]
    answers = pool.run(2, shared_jobs.probe, folders=folders)
    for kind, text, _ in answers:
        assert kind == "UserError"
        assert "output_dir=" in text and "rank 1 on" in text and "does not see" in text
    assert pool.run(2, shared_jobs.probe, folders=[folders[0]] * 2) == [None, None]
    assert list((tmp_path / "here").iterdir()) == []


def test_the_ranks_of_a_run_hold_its_folder_together(pool, tmp_path):
    assert pool.run(2, shared_jobs.hold, folder=str(tmp_path)) == [(1, 0), (1, 0)]


def test_a_bank_written_and_read_by_all(pool, tmp_path):
    for rank, found in enumerate(pool.run(2, shared_jobs.bank, folder=str(tmp_path))):
        assert found["ordinals"] == list(range(12)), rank
        assert found["other plan"] and not found["references before"] and found["references"]
        assert found["read"] == [float(i) for i in range(12)]
        assert found["parts"] == [0, 1, 2, 3, 4, 5]
        assert found["late"] == [6, 7]
        assert found["missing"][0] == "UserError"
        assert "part_00005.parquet does not exist, but manifest.json" in found["missing"][1]


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2},
                                    {"pipeline_model_parallel_size": 2}])
def test_weights_are_read_once_for_all_replicas(pool, hf, tmp_path, layout):
    for found in pool.run(4, shared_jobs.weights, hf=hf, folder=str(tmp_path), layout=layout):
        assert found["same"]
        assert bool(found["reads"]) == (found["dp_rank"] == 0)
        assert found["wrong"][0] == "UserError", "what one rank cannot read every rank refuses"


def test_megatrons_check_of_the_ranks_states_is_heard_and_content(pool, hf, tmp_path):
    quiet = pool.run(2, shared_jobs.checkpoint_log, hf=hf, folder=str(tmp_path / "a"),
                     differs=False)
    assert quiet == [[], []]
    first, second = pool.run(2, shared_jobs.checkpoint_log, hf=hf, folder=str(tmp_path / "b"),
                             differs=True)
    assert first == [] and len(second) == 1 and "seconds" in second[0]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_cannot_write_is_named_on_all(
    pool, hf, tmp_path, rank, asynchronous
):
    for kind, text, _ in pool.run(2, shared_jobs.failing_save, hf=hf, folder=str(tmp_path),
                                  rank=rank, asynchronous=asynchronous):
        assert kind == "UserError"
        assert text.startswith(f"cannot write {tmp_path}/step_000001: File too large.")
    assert list(tmp_path.iterdir()) == []
