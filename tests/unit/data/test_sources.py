"""Several sources in one run: weights, limits, and a share held out by content."""

import json
import random
from dataclasses import replace

import pytest

from megatron_irl.config import DataConfig, DataSource, SplitConfig
from megatron_irl.data.records import collect
from megatron_irl.data.sources import Reading, evaluation_reading, training_reading
from megatron_irl.errors import UserError


def write(path, numbers):
    path.write_text("".join(
        json.dumps({"prompt": f"{i}?", "response": f"{i}!"}) + "\n" for i in numbers))
    return str(path)


def read(reading):
    return collect(reading, lambda found, _: int(found[0].messages[0]["content"][:-1]))


def config(*sources, **options):
    return DataConfig(train=sources, **options)


@pytest.fixture
def seed():
    return random.SystemRandom().randrange(2**31)


def test_weights_and_limits_make_up_a_pass(tmp_path, seed):
    whole, some = write(tmp_path / "a.jsonl", range(400)), write(tmp_path / "b.jsonl", range(50))
    data = config(whole, DataSource((some,), weight=2.0, limit=7))
    assert read(training_reading(data, [])) == [*range(400), *(i for i in range(7) for _ in "ab")]
    half = config(DataSource((whole,), weight=0.5), split=SplitConfig(0.001, seed))
    taken = read(training_reading(half, []))
    assert 140 < len(taken) < 260, seed  # six standard deviations
    assert taken == sorted(set(taken))
    more = config(DataSource((whole,), weight=1.5), split=SplitConfig(0.001, seed))
    counts = [read(training_reading(more, [])).count(i) for i in taken[:50]]
    assert counts == [2] * 50, "another half is doubled than the one that 0.5 takes"


def test_a_weight_takes_the_same_records_beside_others(tmp_path):
    few, many = write(tmp_path / "a.jsonl", range(40)), write(tmp_path / "b.jsonl", range(80))
    first, second = (read(training_reading(config(DataSource((path,), weight=0.4)), []))
                     for path in (few, many))
    assert first == [i for i in second if i < 40] and 0 < len(first) < 40


def test_what_is_held_out_is_not_trained_on_and_stays_so(tmp_path, seed):
    path = write(tmp_path / "a.jsonl", range(1000))
    data = config(path, split=SplitConfig(0.1, seed))
    train, held = read(training_reading(data, [])), read(evaluation_reading(data, []))
    assert sorted(train + held) == list(range(1000))
    assert 40 < len(held) < 160, seed
    # More records, in another order: no record changes sides.
    numbers = list(range(1500))
    random.Random(seed).shuffle(numbers)
    write(tmp_path / "a.jsonl", numbers)
    later = read(evaluation_reading(data, []))
    assert {i for i in later if i < 1000} == set(held)
    other = config(path, split=SplitConfig(0.1, seed + 1))
    assert set(read(evaluation_reading(other, []))) != set(later)


def test_weights_do_not_reach_the_held_out_share(tmp_path):
    path = write(tmp_path / "a.jsonl", range(300))
    plain = config(path, split=SplitConfig(0.3, 5))
    weighed = config(DataSource((path,), weight=0.5), split=SplitConfig(0.3, 5))
    assert read(evaluation_reading(weighed, [])) == read(evaluation_reading(plain, []))
    trained = read(training_reading(weighed, []))
    assert set(trained) < set(read(training_reading(plain, [])))
    # The half is one of what is trained on: not the records with the smallest numbers twice.
    assert 60 < len(trained) < 150


def test_equal_records_are_on_one_side(tmp_path):
    path = write(tmp_path / "a.jsonl", [*range(50)] * 4)
    data = config(path, split=SplitConfig(0.5, 1))
    held = read(evaluation_reading(data, []))
    assert held and all(held.count(i) == 4 for i in held)


def test_sources_have_their_own_form(tmp_path):
    (tmp_path / "qa.jsonl").write_text(json.dumps({"Q": "7?", "A": "7!"}) + "\n")
    fields = {"question": "Q", "answer": "A"}
    data = config(write(tmp_path / "a.jsonl", [1]),
                  DataSource((str(tmp_path / "qa.jsonl"),), fields=fields))
    found = collect(training_reading(data, notes := []), lambda found, _: found[0])
    assert [(c.plain, c.messages[0]["content"]) for c in found] == [(True, "1?"), (False, "7?")]
    assert [note.partition(";")[0].rpartition("/")[2] for note in notes] == [
        "a.jsonl: 1 records as prompt_response (prompt, response)",
        "qa.jsonl: 1 records as alpaca (Q, A)"]


def test_a_file_of_two_sources_is_listed_for_each(tmp_path):
    """A recipe refuses it; what reads files for itself is told what each source took, no sum."""
    path = write(tmp_path / "a.jsonl", range(3))
    reading = Reading((path, DataSource((path,), limit=1)))
    assert read(reading) == [0, 1, 2, 0]
    assert [note.partition(" as ")[0] for note in reading.notes] == [
        f"{path}: 3 records", f"{path}: 1 records"]


def test_bad_records_are_refused_or_left_out_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "1?", "response": "1!"})
    path.write_text(f'{good}\n{{"prompt": "2?", "response": ""}}\n{{\n{good}\n')
    with pytest.raises(UserError, match=r"(?s)2 records cannot be used:.*a\.jsonl:2: .*is empty.*"
                                        r"a\.jsonl:3: not JSON.*data\.bad_records=drop"):
        read(training_reading(config(str(path)), []))
    notes = []
    assert read(training_reading(config(str(path), bad_records="drop"), notes)) == [1, 1]
    assert "a.jsonl:2: " in notes[1] and "a.jsonl:3: not JSON" in notes[1]
    # A record without content has no side: it is named once, with what is trained on.
    split = config(str(path), bad_records="drop", split=SplitConfig(0.5, 1))
    both = [], []
    read(training_reading(split, both[0]))
    read(evaluation_reading(split, both[1]))
    assert sum(note.count("not JSON") for notes in both for note in notes) == 1


@pytest.mark.parametrize("kind", ["pairs", "messages", "sides"])
def test_a_few_empty_answers_are_left_out_and_named(tmp_path, kind):
    """One in ten at most, each named by its line; more of them, or another fault, are an error."""
    def record(number, answer):
        said = {"role": "assistant", "content": answer}
        return {
            "pairs": {"prompt": f"{number}?", "response": answer},
            "messages": {"messages": [{"role": "user", "content": f"{number}?"}, said]},
            "sides": {"prompt": f"{number}?", "chosen": [said], "rejected": [said]},
        }[kind]

    def reading(empty, more=""):
        lines = [json.dumps(record(i, " " if i in empty else f"{i}!")) for i in range(30)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + f"\n{more}")
        return training_reading(config(str(tmp_path / "a.jsonl")), [])

    found = reading({4, 17, 29})
    assert read(found) == [i for i in range(30) if i not in (4, 17, 29)]
    (note,) = [note for note in found.notes if "have an empty" in note]
    assert note.startswith("warning: 3 of 30 records have an empty answer")
    assert note.endswith(", ".join(f"{tmp_path}/a.jsonl:{line}" for line in (5, 18, 30)))
    with pytest.raises(UserError, match=r"(?s)4 records cannot be used:.*a\.jsonl:6: .*empty"):
        read(reading({4, 5, 17, 29}))
    with pytest.raises(UserError, match=r"a\.jsonl:31: not JSON") as raised:
        read(reading({4}, "{"))
    assert "is empty" not in str(raised.value)
    with pytest.raises(UserError, match="is empty"):
        read(replace(reading({4}), bad_records="error"))


def test_many_files_are_summed_up(tmp_path):
    paths = tuple(write(tmp_path / f"{i:02}.jsonl", [i]) for i in range(20))
    assert read(Reading(paths, notes=(notes := []))) == list(range(20))
    assert len(notes) == 13
    assert notes[-1] == "... and 8 more files; in all of them: prompt_response (prompt, response)"


def test_an_empty_file_among_others_is_named(tmp_path):
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"b\.jsonl: the file has no records"):
        read(Reading((write(tmp_path / "a.jsonl", [1]), tmp_path / "b.jsonl")))
