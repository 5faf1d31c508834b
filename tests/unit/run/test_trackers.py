"""TensorBoard purges what is done again; W&B continues one run, offline."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_irl.errors import UserError
from megatron_irl.run.trackers import Trackers, build_trackers, flatten

ONLY_TENSORBOARD = {"tensorboard": True, "wandb": False, "wandb_project": None,
                    "wandb_mode": None}


def scalars(run_dir, key):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_flatten_takes_numbers_of_nested_mappings():
    values = {"a": 1, "b": {"c": 2.5, "d": {"e": True}}, "text": "x", "list": [1], "none": None}
    assert dict(flatten(values)) == {"a": 1, "b/c": 2.5, "b/d/e": True}


@pytest.mark.parametrize(("resume_step", "kept"), [
    (2, [(1, 1.0), (2, 2.0), (3, 30.0)]), (None, [(3, 30.0)]), (0, [(3, 30.0)])])
def test_tensorboard_forgets_the_steps_done_again(tmp_path, resume_step, kept):
    trackers = build_trackers(tmp_path, {}, **ONLY_TENSORBOARD, resume_step=None, warn=pytest.fail)
    for step in (1, 2, 3, 4):
        trackers.log(step, {"loss": float(step), "time": {"train": 1.0}})
    trackers.log_text(4, "samples", "<b>*text*</b>\nline")
    trackers.close()
    trackers = build_trackers(tmp_path, {}, **ONLY_TENSORBOARD, resume_step=resume_step,
                              warn=pytest.fail)
    trackers.log(3, {"loss": 30.0})
    trackers.close()
    assert scalars(tmp_path, "loss") == kept


def test_no_tracker_is_asked_for(tmp_path):
    trackers = build_trackers(tmp_path / "run", {}, tensorboard=False, wandb=False,
                              wandb_project=None, wandb_mode=None, resume_step=None,
                                  warn=pytest.fail)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert trackers.trackers == [] and list((tmp_path / "run").iterdir()) == []


def test_all_trackers_get_everything():
    class Fake:
        """Writes down its calls."""

        def __init__(self):
            self.calls = []

        def log(self, step, values):
            self.calls.append((step, values))

        def log_text(self, step, key, text):
            self.calls.append((step, key, text))

        def close(self):
            self.calls.append("closed")

    fakes = [Fake(), Fake()]
    trackers = Trackers(fakes)
    trackers.log(1, {"a": 1})
    trackers.log_text(2, "k", "t")
    trackers.close()
    for fake in fakes:
        assert fake.calls == [(1, {"a": 1}), (2, "k", "t"), "closed"]


@pytest.mark.parametrize(("module", "option"), [
    ("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, module, option):
    monkeypatch.setitem(sys.modules, module, None)
    options = {"tensorboard": False, "wandb": False, option: True}
    with pytest.raises(UserError, match=f"logging.{option}=true.*pip install {option}"):
        build_trackers(tmp_path, {}, **options, wandb_project=None, wandb_mode=None,
                       resume_step=None, warn=pytest.fail)


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()  # it reads the environment once per process, which an earlier test had it do
    return monkeypatch


def test_wandb_offline_continues_under_the_same_id(tmp_path, wandb_home):
    wandb_home.setenv("WANDB_MODE", "offline")
    run_dir, ids = tmp_path / "run", set()
    for resume_step in (None, 1):
        trackers = build_trackers(run_dir, {"seed": 1}, tensorboard=False, wandb=True,
                                  wandb_project="p", wandb_mode=None, resume_step=resume_step,
                                      warn=pytest.fail)
        trackers.log((resume_step or 0) + 1, {"loss": 1.0, "evaluation": {"nll": 2.0}})
        trackers.log_text(1, "samples", "<b>")
        ids.add(trackers.trackers[0].run_id)
        trackers.close()
    (run_id,) = ids
    assert (run_dir / "wandb/run_id.txt").read_text().strip() == run_id
    files = list((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and all(file.stat().st_size > 0 for file in files)


def test_a_tracker_that_cannot_be_opened_does_not_stop_the_run(tmp_path):
    (tmp_path / "tensorboard").write_text("not a folder")
    said = []
    trackers = build_trackers(tmp_path, {}, **ONLY_TENSORBOARD, resume_step=None, warn=said.append)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert len(said) == 1 and "TensorBoard cannot be opened" in said[0]


def test_a_resumed_run_goes_on_without_a_package_it_had(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    build_trackers(tmp_path, {}, **ONLY_TENSORBOARD, resume_step=4, warn=said.append)
    assert len(said) == 1 and "pip install tensorboard" in said[0]
