"""Questions with an instruction, drafts that a program edits, and who judges the answers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_irl.errors import UserError
from megatron_irl.storage.commit import write_jsonl_atomically
from studies import instructions
from studies.by_instruction import shares
from studies.drafts import Questions
from studies.instructions import INSTRUCTIONS, follows, instruction_of
from studies.material import Letters, material_of
from studies.model import pretrained
from studies.points import Point
from studies.questions import FORMS, TOPICS, draw_questions
from studies.study import read_study

DRAFTS = {  # what the edits make of them, by hand
    "quotation": ('He said "no", twice. ', "\"He said 'no', twice.\""),
    "lowercase": ("The Moon, I think.", "the moon, i think."),
    "no_comma": ("Red, green, and blue.", "Red green and blue."),
}


@pytest.fixture
def plain_checkers(monkeypatch):
    """lm-eval's checkers, but for the guess of the language."""
    checks = {
        "startend:quotation": lambda t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
        "change_case:english_lowercase": str.islower,
        "punctuation:no_comma": lambda t: "," not in t,
    }
    monkeypatch.setattr(instructions, "_registry", lambda: {
        name: lambda _, check=check: SimpleNamespace(
            build_description=lambda: "", check_following=check)
        for name, check in checks.items()})
    instructions._checker.cache_clear()
    yield
    instructions._checker.cache_clear()


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_edits_by_hand(name, plain_checkers):
    draft, edited = DRAFTS[name]
    assert INSTRUCTIONS[name].edit(draft) == edited
    assert follows(name, edited) and not follows(name, draft) and not follows(name, " ")
    assert instruction_of(f"Why do people like bees? {INSTRUCTIONS[name].text}") == name


def test_edits_please_the_checkers_of_lm_eval():
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'lm-eval[ifeval]'")
    pytest.importorskip("langdetect", reason="IFEval's: pip install 'lm-eval[ifeval]'")
    instructions._checker.cache_clear()
    draft = 'The Moon is called "Luna" in other languages, and it is far away from the Earth.'
    for name, instruction in INSTRUCTIONS.items():
        assert not follows(name, draft) and follows(name, instruction.edit(draft))
        checker = instructions._registry()[instruction.checker](instruction.checker)
        assert checker.build_description() == instruction.text


def test_who_judges_is_said_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    instructions._checker.cache_clear()
    with pytest.raises(UserError, match=r"langdetect is not installed.*pip install 'lm-eval\["):
        follows("no_comma", "Yes.")


def test_no_topic_is_in_two_splits():
    sizes = {"test": 25, "validation": 12, "train": 90}
    splits = draw_questions(5, **sizes)
    assert {name: len(records) for name, records in splits.items()} == sizes
    prompts = [Questions().key(r) for records in splits.values() for r in records]
    assert len(set(prompts)) == 127 and {instruction_of(p) for p in prompts} == set(INSTRUCTIONS)
    questions = {form.format(topic): topic for form in FORMS for topic in TOPICS}
    assert len(questions) == len(FORMS) * len(TOPICS)
    topics = [{next(t for q, t in questions.items() if Questions().key(r).startswith(q))
               for r in records} for records in splits.values()]
    assert not set.intersection(*topics[:2]) and not topics[2] & (topics[0] | topics[1])
    assert splits == draw_questions(5, **sizes) != draw_questions(6, **sizes)
    with pytest.raises(ValueError, match="more than 121 topics"):
        draw_questions(5, train=700, test=60)


def test_half_of_the_drafts_are_edited(plain_checkers):
    """Drafts without an end, empty ones and such as no edit helps are nobody's demonstration."""
    material = material_of("instructions")
    records = draw_questions(1, train=120)["train"]
    drafts = [{**record, "response": f"The {place}th, Answer.", "finish_reason": "stop"}
              for place, record in enumerate(records)]
    drafts[0]["finish_reason"] = "length"
    drafts[1]["response"] = ""
    drafts[2]["response"] = "."  # not lowercase, whatever the edit
    records[2] = {"prompt": [{"role": "user", "content": INSTRUCTIONS["lowercase"].text}]}
    task = {"train": 100, "unedited": 0.4}
    made = material.demonstrations(records, drafts, task, 7)
    assert [m["prompt"] for m in made] == [r["prompt"] for r in records[3:103]]
    assert sum(not m["is_edited"] for m in made) == 40
    for place, one in enumerate(made, start=3):
        draft, name = drafts[place]["response"], instruction_of(material.key(one))
        assert one["response"] == (INSTRUCTIONS[name].edit(draft) if one["is_edited"] else draft)
        assert one["is_right"] == one["is_edited"]
    assert made == material.demonstrations(records, drafts, task, 7)
    assert made != material.demonstrations(records, drafts, task, 8)
    with pytest.raises(UserError, match=r"117 of 120 drafts.*task\.drafts higher"):
        material.demonstrations(records, drafts, task | {"train": 118}, 7)


def test_words_have_drafts_only_where_some_are_not_edited():
    letters = Letters("mirror")
    assert not letters.needs_drafts({}) and not letters.needs_drafts({"unedited": 0.0})
    records = letters.splits(3, {"train": 40, "validation": 2, "test": 2})["train"]
    drafts = [{"prompt": r["prompt"], "response": "" if place < 5 else r["response"][::-1]}
              for place, r in enumerate(records)]
    made = letters.demonstrations(records, drafts, {"unedited": 1.0}, 0)
    assert made[:5] == records[:5]
    assert [m["response"] for m in made[5:]] == [letters.key(r) for r in records[5:]]


def test_points_keep_the_folders_they_had():
    """As named on 2026-11-27, before a study could begin with a pretrained model."""
    point = Point({"name": "reverse", "train": 16}, {"hidden": 32, "layers": 1}, {"steps": 2},
                  "sft", {"lr": 1e-3}, 0)
    assert point.name == "sft-3d7408b3fd"


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no model.*make_smollm2\.py --out .*none"):
        pretrained(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    assert pretrained(str(tmp_path)) == tmp_path.resolve()


def test_shares_by_instruction(tmp_path, plain_checkers):
    study = read_study(Path(__file__).parents[3] / "studies" / "smollm2.yaml")
    settings = {m.name: m.trials()[0] for m in study.methods}
    results = {"levels": {"": {name: {"settings": s} for name, s in settings.items()}}}
    lines = [{"prompt": [{"role": "user", "content": i.text}]} for i in INSTRUCTIONS.values()]
    for method in study.methods:
        for seed in study.seeds:
            point = study.point("", method, settings[method.name], seed)
            for kind, answer in (("greedy", "no, no"), ("sampled", '"yes"')):
                folder = tmp_path / "points" / point.name / "test"
                write_jsonl_atomically(folder / f"{kind}.jsonl",
                                       [line | {"response": answer} for line in lines])
    found = shares(study, results, tmp_path)
    assert len(found) == len(settings) * 2 * len(INSTRUCTIONS)
    for (_, kind, name), share in found.items():
        assert share == (name == "lowercase" if kind == "greedy" else 1.0)
