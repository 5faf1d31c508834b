"""The languages and what is right in them, paired statistics by hand, and the files of studies."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_irl.config import recipe_from_mapping, resolve
from megatron_irl.errors import UserError
from studies.answers import best_of, shares
from studies.cost import equal_steps
from studies.material import Letters
from studies.methods import ALGORITHMS, recipe_of
from studies.points import Point
from studies.report import table
from studies.rewards import area_under_curve
from studies.statistics import paired_difference
from studies.study import read_study, shared_trainings, starts_of
from studies.tasks import TASKS, is_chain, is_subsequence, make_examples
from studies.why import training_signs, why_table

STUDIES = sorted((Path(__file__).parents[3] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_right_and_most_other_words_are_not(name):
    task, rng = TASKS[name], random.Random()
    for _ in range(50):
        prompt = task.prompt(rng, task.length)
        answer = task.answer(rng, prompt)
        assert task.is_right(prompt, answer)
        assert not task.is_right(prompt, answer[:-1]) and not task.is_right(prompt, answer + "a")


def test_chains_by_hand():
    assert is_chain("abc", "abcabcba")
    assert not is_chain("abc", "abcabcab")  # does not close
    assert not is_chain("abc", "abbcacba")  # a letter beside itself
    assert not is_chain("abc", "abababca")  # c once
    assert not is_chain("abc", "abcabdba")  # another letter


def test_subsequences_by_hand():
    right = {"".join(pair) for pair in itertools.combinations("abca", 2)}
    words = {"".join(pair) for pair in itertools.product("abcd", repeat=2)}
    assert {word for word in words if is_subsequence("abca", word)} == right


def test_no_prompt_is_in_two_splits_and_corruption_moves_answers():
    task = TASKS["reverse"]
    splits = make_examples(task, 3, train=200, validation=50, test=50, corrupted=0.25)
    prompts = [e.prompt for examples in splits.values() for e in examples]
    assert len(set(prompts)) == 300
    clean = make_examples(task, 3, train=200, validation=50, test=50)["train"]
    wrong = [e for e in splits["train"] if not e.is_right]
    assert 45 <= len(wrong) <= 50  # an answer may happen to fit another prompt
    assert sorted(e.answer for e in clean) == sorted(e.answer for e in splits["train"])
    longer = make_examples(task, 3, train=5, validation=5, test=5, test_length=6)["test"]
    assert {len(e.prompt) for e in longer} == {6}


def test_what_a_model_saw_before_stays_whatever_comes_after():
    task = TASKS["mirror"]
    first, second = (make_examples(task, 3, train=size, validation=20, test=20, before=400,
                                   habit=0.75, lengths=(4, 5)) for size in (50, 100))
    assert first["before"] == second["before"] and len(first["before"]) == 400
    assert {len(e.prompt) for e in first["before"]} == {4, 5}
    assert all(e.answer == (e.prompt[::-1] if e.is_right else e.prompt) for e in first["before"])
    assert 260 < sum(not e.is_right for e in first["before"]) < 340
    prompts = [e.prompt for examples in second.values() for e in examples]
    assert len(set(prompts)) == len(prompts) == 540
    assert all(e.is_right for name in ("train", "validation", "test") for e in second[name])


def test_area_under_curve_by_hand():
    assert area_under_curve(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 3 / 4
    assert area_under_curve(np.array([1.0]), np.array([1.0])) == 1 / 2
    assert area_under_curve(np.array([0.0]), np.array([1.0, 2.0])) == 0


def test_paired_difference_by_hand():
    """Four prompts changed, all for the better: p is 2 of the 16 patterns of signs."""
    ours, theirs = [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(4 / 6)
    assert found.p == pytest.approx(2 / 16, abs=0.01)
    assert 0 <= found.low < found.mean < found.high <= 1


def test_no_difference_is_found_where_there_is_none():
    rng = np.random.default_rng()
    ps = []
    for _ in range(40):
        a, b = rng.integers(0, 2, (2, 3, 60))
        ps.append(paired_difference(a.tolist(), b.tolist(), draws=500).p)
    assert 0.2 < float(np.mean(ps)) < 0.8
    assert paired_difference([[1.0, 0.0]], [[1.0, 0.0]], draws=100).p == 1.0


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_studies_in_the_repository_can_be_read(path):
    study = read_study(path)
    assert len(study.seeds) >= 3 and study.trial_seed not in study.seeds
    assert len(study.hypothesis.split()) > 10
    for method in study.methods:
        for settings in method.trials():
            point = study.point(next(iter(study.levels)), method, settings, 0)
            for part in [*point.trained, *point.needs]:
                recipe = recipe_of(part.method, part.settings, start=path, demonstrations=path,
                                   out=path, seed=0)
                resolve(recipe_from_mapping(recipe), point.task["train"])
    assert {m.kind for m in study.methods} <= {*ALGORITHMS, "start", "best_of"}


def test_unequal_numbers_of_trials_are_refused(tmp_path):
    study = {
        "name": "unfair", "hypothesis": "more trials win", "task": {}, "model": {}, "start": {},
        "seeds": [0], "trial_seed": 9,
        "methods": {"sft": {"grid": {"lr": [1]}}, "irft": {"grid": {"lr": [1, 2]}}},
    }
    path = tmp_path / "unfair.yaml"
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(UserError, match="equally many trials.*'irft': 2, 'sft': 1"):
        read_study(path)
    path.write_text(yaml.safe_dump(study | {"sedes": []}))
    with pytest.raises(UserError, match="unknown keys.*sedes"):
        read_study(path)


def test_the_table_compares_with_sft():
    def entry(sampled):
        return {"settings": {"lr": 1}, "trials": 1, "validation": None, "seeds": [
            {"greedy": [1.0, 0.0], "sampled": sampled, "distinct": [1.0, 0.5], "seconds": 3.0}]}

    text = table({"name": "n", "hypothesis": "h", "metric": "sampled", "levels": {
        "": {"sft": entry([0.0, 0.0]), "rft": entry([1.0, 1.0])}}})
    assert "| rft | lr 1 | 50.0 | 100.0 | 75.0 | +0.0 [+0.0, +0.0] | 1.0000 | +100.0 [" in text


def test_no_two_points_of_a_stage_make_the_same_start():
    """Levels that differ in what was edited share a model to start from, and not their drafts."""
    before = {"before": 8, "steps": 1}
    points = [(Point({"name": "mirror", "unedited": share}, {}, before, kind, {}, seed), "test")
              for kind in ("sft", "irft") for share in (0.0, 0.5) for seed in (0, 1)]
    models, drafts = starts_of(points)
    assert sorted(p.seed for p, _ in models) == [0, 1]
    assert sorted((p.seed, p.task["unedited"]) for p, _ in drafts) == [
        (0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    assert {p.method for p, _ in models + drafts} == {"start"}


def test_points_that_differ_in_what_is_sampled_share_a_training():
    """A point keeps its name whatever methods there are: results of earlier studies stay."""
    sft = {"steps": 3, "lr": 1.0}
    irft = {"kind": "irft", "steps": 3}
    plain = Point({"name": "mirror"}, {}, {}, "sft", sft, 0)
    assert plain.name == "sft-e893218e37"
    colder = Point({"name": "mirror"}, {}, {}, "sft", sft | {"temperature": 0.5}, 0)
    best = Point({"name": "mirror"}, {}, {}, "best_of",
                 {"n": 2, "draws": sft | {"kind": "sft"}, "judge": irft}, 0)
    kept = Point({"name": "mirror"}, {}, {}, "filtered", sft | {"reward": irft}, 0)
    old = Point({"name": "mirror"}, {}, {}, "filtered", sft | {"reward": {"steps": 3}}, 0)
    judge = Point({"name": "mirror"}, {}, {}, "irft", {"steps": 3}, 0)
    assert colder.trained == [plain] and plain.trained == [plain]
    assert best.trained == best.needs == [plain, judge] and kept.needs == [judge]
    assert plain.needs == old.needs == []
    points = [(p, "test") for p in (plain, colder, best, kept, old)]
    assert shared_trainings(points) == [plain, judge]


def test_best_of_every_n_by_hand():
    assert best_of(["a", "b", "c", "d"], [0.0, 1.0, 2.0, 2.0], 2) == ["b", "c"]
    assert best_of(["a", "b"], [0.0, 1.0], 1) == ["a", "b"]
    assert shares(Letters("mirror"), {"ab": ["ba", "ab"], "bc": ["cb"]}) == [0.5, 1.0]


def test_steps_that_take_as_long_by_hand():
    """A run of sft takes 2 seconds and a step half a second."""
    seconds = {"short": [99.0, 7.0, 7.0], "long": [12.0, 12.0, 12.0]}
    assert equal_steps(22.0, seconds, {"short": 10, "long": 20}) == pytest.approx(40)


def test_signs_are_of_the_last_tenth(tmp_path):
    (tmp_path / "run").mkdir()
    lines = [{"step": n, "logp/demo": float(-n), **({"policy/entropy": 1.0} if n > 15 else {})}
             for n in range(1, 21)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert training_signs(tmp_path) == {"logp/demo": -19.5, "policy/entropy": 1.0}
    assert training_signs(tmp_path / "none") == {}
    entry = {"seeds": [{"greedy": [1.0, 1.0], "sampled": [0.5, 0.0], "distinct": [0.5, 0.5],
                        "signs": {"logp/demo": -2.0}, "auc": 0.75}]}
    text = why_table({"levels": {"": {"irft": entry}}})
    assert "| irft | 75.0 | 50.0 | -2.00 |  |  |  | 0.750 |" in text
