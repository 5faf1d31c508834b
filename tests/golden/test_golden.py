"""The code of today does what was recorded, and the comparison would notice if it did not."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from tests.golden import cases, ranks
from tests.golden.compare import compare, describe_mode, tolerance_of
from tests.golden.inputs import EOS, demonstration, preference, write_inputs
from tests.golden.record import record

RECORD = Path(__file__).with_name("record.json")


@pytest.fixture(scope="module")
def known():
    return json.loads(RECORD.read_text())


def test_record_has_every_run_and_says_where_it_comes_from(known):
    assert list(known["runs"]) == cases.names()
    assert set(cases.SUITE) <= set(known["runs"])
    assert len(known["commit"]) == len(known["product"]) == 40
    assert known["command"].startswith("python -m tests.golden.record")
    assert {"torch", "megatron-core", "numpy", "cpu", "cpu_flags"} <= known["environment"].keys()


def test_runs_of_the_suite_are_those_recorded(known, pool, tmp_path):
    """The other runs are behind ``python -m tests.golden.compare``."""
    exact = describe_mode(known["environment"], pool.run(1, ranks.environment)[0])
    found = {
        name: compare(
            known["runs"][name], now, exact=exact, tolerance=tolerance_of(name)
        ).differences
        for name, now in record(pool, tmp_path, cases.SUITE)
    }
    assert found == {name: [] for name in cases.SUITE}


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_chat_rendered_whole_has_the_ids_of_prompt_and_response(tmp_path_factory, family):
    """So that a record stays true whichever of the two the product does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_inputs(tmp_path_factory.mktemp("in")) / family)

    def ids(messages, **options):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    chats = [demonstration(i)["messages"] for i in range(40)]
    for pair in map(preference, range(40)):
        chats += [[*pair["prompt"], {"role": "assistant", "content": pair[key]}]
                  for key in ("chosen", "rejected")]
    for messages in chats:
        answer = messages[-1]["content"]
        assert answer[0].isalpha() and answer == answer.strip()
        prompt = ids(messages[:-1], add_generation_prompt=True)
        response = tokenizer(answer, add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert ids(messages) == [*prompt, *response, EOS, *newline]
        assert tokenizer.decode(response) == answer
    assert max(len(ids(messages)) for messages in chats) <= 128


@pytest.fixture
def run(known):
    return deepcopy(known["runs"]["rft_mixed/dp2"])


def changed(run, *path, to):
    other = deepcopy(run)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return other


@pytest.mark.parametrize("path", [
    ("samples", 1, "ids"), ("samples", 0, "logps"), ("samples", 0, "references"),
    ("samples", 1, "rewards"), ("metrics", "lr"), ("weights", "hf"), ("weights", "hf_reward"),
])
def test_another_digest_is_a_difference_where_bits_must_agree(run, path):
    other = changed(run, *path, to="0")
    assert len(compare(run, other, exact=True).differences) == 1
    assert compare(run, run, exact=True).differences == []


def test_a_loss_may_differ_by_rounding_in_another_environment_only(run):
    loss = run["steps"][1][1]
    near = changed(run, "steps", 1, 1, to=loss * (1 + 5e-6))
    far = changed(run, "steps", 1, 1, to=loss * (1 + 2e-5))
    assert compare(run, near, exact=True).differences != []
    assert compare(run, near, exact=False).differences == []
    assert "step 2" in compare(run, far, exact=False).differences[0]


def test_bf16_is_held_to_its_own_rounding():
    assert tolerance_of("bf16/one") == 1e-2 and tolerance_of("rft/dp2") == 1e-5


def test_other_samples_end_a_comparison_across_environments(run):
    """From there on a run is another run; what came before still counts."""
    other = changed(changed(run, "samples", 1, "ids", to="0"), "steps", 9, 1, to=9.0)
    found = compare(run, other, exact=False)
    assert found.differences == [] and "round 1" in found.notes[0]
    before = changed(other, "steps", 0, 1, to=9.0)
    assert compare(run, before, exact=False).differences != []
    shorter = run | {"steps": run["steps"][:-1]}
    assert compare(run, shorter, exact=False).differences != []
