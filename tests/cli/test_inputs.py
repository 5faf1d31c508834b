"""``generate`` and ``score`` take what ``train`` takes, what the other wrote, and lose nothing."""

import json
import os
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest

from megatron_irl.generation.megatron_engine import MegatronGenerator
from tests.cli.harness import edited_copy, read_jsonl, refused, run, write_jsonl
from tests.unit.data import hub_files
from tests.unit.data.test_chat_template import RICH

USER, GOOD = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}


def generate(model, prompts, out, *options):
    result = run("generate", "--model", model, "--prompts", prompts, "--out", out,
                 "--max-new-tokens", 5, "--seed", 3, *options)
    assert result.code == 0, result.err
    return result.err


def ids(lines):
    return [line["token_ids"] for line in lines]


@pytest.fixture
def asked(tmp_path):
    return write_jsonl(tmp_path / "asked.jsonl", [{"prompt": [USER]}, {"prompt": [USER]}])


@pytest.fixture
def base(model, asked, tmp_path):
    """What is sampled for two prompts given as messages."""
    generate(model, asked, tmp_path / "base.jsonl")
    return read_jsonl(tmp_path / "base.jsonl")


@pytest.mark.parametrize("record", [
    {"messages": [USER, GOOD]}, {"messages": [USER]}, {"question": "2+2", "answer": "4"},
    {"instruction": "2+2"}, {"conversations": [{"from": "human", "value": "2+2"}]},
    {"prompt": "2+2", "messages": [USER, GOOD]},
])
def test_every_form_is_the_same_prompt(model, base, tmp_path, record):
    prompts = write_jsonl(tmp_path / "p.jsonl", [record | {"id": 7}] * 2)
    said = generate(model, prompts, tmp_path / "o.jsonl")
    lines = read_jsonl(tmp_path / "o.jsonl")
    assert ids(lines) == ids(base)
    assert lines[0] == base[0] | record | {"id": 7, "prompt": [USER]}
    assert f"{prompts}: 2 records as " in said and "past the model's chat template" not in said


def test_a_string_prompt_is_noted_once(model, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2"}, {"prompt": [USER]}])
    said = generate(model, prompts, tmp_path / "o.jsonl")
    assert said.count("1 of 2 prompts are strings and are taken as they are, past the model's "
                      "chat template") == 1
    assert read_jsonl(tmp_path / "o.jsonl")[0]["prompt"] == "2+2"


def test_what_generate_writes_fits_score(finished, tmp_path):
    """The response that was sampled is scored, not the one that the record came with."""
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"messages": [USER, GOOD]}, {"prompt": "2+2"},
                                                 {"question": "2+2", "answer": "4"}])
    said = generate(finished, prompts, tmp_path / "o.jsonl")
    assert said.endswith(f"\nwrote 3 responses to {tmp_path / 'o.jsonl'}\n")
    lines = read_jsonl(tmp_path / "o.jsonl")
    asked = [{"prompt": line["prompt"], "responses": [line["response"]]} for line in lines]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", asked)
    for name, given in (("a", tmp_path / "o.jsonl"), ("b", pairs)):
        result = run("score", "--model", finished, "--pairs", given, "--out",
                     tmp_path / f"{name}.jsonl")
        assert result.code == 0, result.err
        assert result.err.endswith(f"\nwrote rewards of 3 responses to {tmp_path / name}.jsonl\n")
    ours, expected = read_jsonl(tmp_path / "a.jsonl"), read_jsonl(tmp_path / "b.jsonl")
    assert [line["rewards"] for line in ours] == [line["rewards"] for line in expected]
    assert [line["token_ids"] for line in ours] == ids(lines)


def test_score_takes_conversations_and_preferences(finished, tmp_path):
    given = [{"messages": [USER, GOOD]}, {"prompt": [USER], "response": "4"},
             {"prompt": [USER], "completions": ["4"]},
             {"prompt": [USER], "chosen": "4", "rejected": "5"}]
    known = [{"prompt": [USER], "responses": ["4", "5"]}]
    found = []
    for name, records in (("a", given), ("b", known)):
        pairs = write_jsonl(tmp_path / f"{name}.jsonl", records)
        out = tmp_path / f"{name}_out.jsonl"
        result = run("score", "--model", finished, "--pairs", pairs, "--out", out)
        assert result.code == 0, result.err
        found.append([line["rewards"] for line in read_jsonl(out)])
    ((four, five),) = found[1]
    assert four != five
    assert found[0] == [[pytest.approx(each, abs=1e-6) for each in rewards]
                        for rewards in ([four], [four], [four], [four, five])]


def test_samples_of_a_prompt(model, base, asked, tmp_path):
    """The first sample is the one there is by default, and a line has its number."""
    generate(model, asked, tmp_path / "o.jsonl", "--num-samples", 3, "--part-size", 2)
    lines = read_jsonl(tmp_path / "o.jsonl")
    assert [line["sample"] for line in lines] == [0, 1, 2] * 2
    assert ids(lines[::3]) == ids(base)
    assert len({tuple(each) for each in ids(lines)}) > 3
    refused("generate", "--model", model, "--prompts", asked, "--out", tmp_path / "x.jsonl",
            "--num-samples", 2, "--temperature", 0, named=("--num-samples 2", "--temperature 0"))


def test_stop_ends_a_response_at_once(model, base, asked, tmp_path, monkeypatch):
    """Text and tokens are cut, no token is sampled after the text, and other responses stay."""
    text = base[0]["response"]
    assert len(text) >= 3 and base[0]["finish_reason"] == "length", base[0]
    sampled, original = [], MegatronGenerator.generate

    def recorded(self, *args, **options):
        found = original(self, *args, **options)
        sampled.extend(found)
        return found

    monkeypatch.setattr(MegatronGenerator, "generate", recorded)
    generate(model, asked, tmp_path / "o.jsonl", "--stop", text[1:3], "--stop", "never there")
    line, other = read_jsonl(tmp_path / "o.jsonl")
    assert text[1:3] not in base[1]["response"] and ids([other]) == ids(base[1:])
    assert len(sampled[0].token_ids) == len(line["token_ids"]) < len(base[0]["token_ids"])
    generate(model, asked, tmp_path / "p.jsonl", "--stop", text[2:])
    line = read_jsonl(tmp_path / "p.jsonl")[0]
    assert line["response"] == text[: text.index(text[2:])]
    assert line["finish_reason"] == "stop"
    count = len(line["token_ids"])
    assert line["token_ids"] == base[0]["token_ids"][:count]
    assert line["logprobs"] == pytest.approx(base[0]["logprobs"][:count], abs=1e-4)
    refused("generate", "--model", model, "--prompts", asked, "--out", tmp_path / "x.jsonl",
            "--stop", "", named=("--stop ''",))


def test_a_system_turn(model, base, tmp_path):
    system = {"role": "system", "content": "Add."}
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [USER]}, {"prompt": [system, USER]}])
    given = write_jsonl(tmp_path / "g.jsonl", [{"prompt": [system, USER]}] * 2)
    generate(model, prompts, tmp_path / "a.jsonl", "--system", "Add.")
    generate(model, given, tmp_path / "b.jsonl")
    assert read_jsonl(tmp_path / "a.jsonl") == read_jsonl(tmp_path / "b.jsonl")
    assert ids(read_jsonl(tmp_path / "a.jsonl")) != ids(base)
    text = write_jsonl(tmp_path / "t.jsonl", [{"prompt": [USER]}, {"prompt": "2+2"}])
    refused("generate", "--model", model, "--prompts", text, "--out", tmp_path / "x.jsonl",
            "--system", "Add.", named=("--system", f"{text}:2", "string"))


def test_lines_are_streamed(model, asked, base, tmp_path, capfdbinary):
    generate(model, asked, tmp_path / "o.jsonl", "--stream", "--part-size", 1)
    printed = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert printed == read_jsonl(tmp_path / "o.jsonl") and ids(printed) == ids(base)
    # Whoever is finished first is printed first; the file has the order of the prompts.
    stop = base[1]["response"][:2]
    assert stop not in base[0]["response"], base
    generate(model, asked, tmp_path / "p.jsonl", "--stream", "--stop", stop)
    printed = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert printed == read_jsonl(tmp_path / "p.jsonl")[::-1]


def test_parquet_is_written_and_read_again(finished, tmp_path):
    records = [{"messages": [USER, GOOD], "id": 1, "note": "a"}, {"messages": [USER], "id": 2.5},
               {"messages": [USER], "id": 3, "note": ["b"], "empty": {}}]
    prompts = write_jsonl(tmp_path / "p.jsonl", records)
    generate(finished, prompts, tmp_path / "o.jsonl")
    generate(finished, prompts, tmp_path / "o.parquet")
    expected = read_jsonl(tmp_path / "o.jsonl")
    found = pq.read_table(tmp_path / "o.parquet").to_pylist()
    for name in ("response", "token_ids", "logprobs", "finish_reason", "prompt", "id"):
        assert [row[name] for row in found] == [line[name] for line in expected], name
    # Values without a type in common are JSON, line by line.
    assert [row["note"] for row in found] == ['"a"', None, '["b"]']
    assert [row["empty"] for row in found] == [None, None, "{}"]
    for suffix in ("jsonl", "parquet"):
        result = run("score", "--model", finished, "--pairs", tmp_path / f"o.{suffix}", "--out",
                     tmp_path / f"s.{suffix}")
        assert result.code == 0, result.err
    scored = pandas.read_parquet(tmp_path / "s.parquet")["rewards"].tolist()
    assert [list(each) for each in scored] == [
        line["rewards"] for line in read_jsonl(tmp_path / "s.jsonl")]
    mixed = write_jsonl(tmp_path / "m.jsonl", [{"prompt": [USER]}, {"prompt": "2+2"}])
    refused("generate", "--model", finished, "--prompts", mixed, "--out", tmp_path / "x.parquet",
            named=("x.parquet", "some prompts are strings"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([
        "p.jsonl", "o.jsonl", "o.parquet", "s.jsonl", "s.parquet", "m.jsonl"])


@pytest.mark.parametrize("command", [("generate", "--prompts"), ("score", "--pairs")])
def test_finished_outputs_are_not_overwritten_unasked(finished, tmp_path, command):
    name, flag = command
    given = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2", "responses": ["4"]}])
    out = tmp_path / "o.jsonl"
    out.write_text("precious\n")
    arguments = [name, "--model", finished, flag, given, "--out", out]
    arguments += ["--max-new-tokens", 4] if name == "generate" else []
    refused(*arguments, named=(str(out), "exists already", "--overwrite"))
    assert out.read_text() == "precious\n"
    assert run(*arguments, "--overwrite").code == 0
    assert read_jsonl(out)[0]["prompt"] == "2+2"


def test_fields_folders_and_home(model, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pandas.DataFrame({"Q": ["2+2"] * 2}).to_parquet(folder / "train-00000-of-00001.parquet")
    generate(model, "~/set", "~/o.jsonl", "--field", "question=Q")
    assert ids(read_jsonl(tmp_path / "o.jsonl")) == ids(base)
    for options, named in ((("--field", "Q"), ("--field Q", "OURS=THEIRS")),
                           (("--field", "qestion=Q"), ("qestion", "question")),
                           (("--field", "question=q"), ('no "q"', "its keys are: Q"))):
        refused("generate", "--model", model, "--prompts", "~/set", "--out", "~/x.jsonl", *options,
                named=named)


def test_score_elsewhere_names_the_recipe_and_its_path(finished, tmp_path, monkeypatch):
    """A run whose recipe has a relative path is scored where that path leads nowhere."""
    run_folder = tmp_path / "run"
    run_folder.symlink_to(finished)
    recipe = (finished / "recipe.yaml").read_text()
    hf = next(line.split(": ")[1] for line in recipe.splitlines() if line.startswith("  hf: "))
    copy = tmp_path / "moved"
    copy.mkdir()
    for each in finished.iterdir():
        if each.name != "recipe.yaml":
            os.symlink(each, copy / each.name)
    (copy / "recipe.yaml").write_text(recipe.replace(hf, "models/tiny"))
    given = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2", "responses": ["4"]}])
    monkeypatch.chdir(tmp_path)
    arguments = ("score", "--model", copy, "--pairs", given, "--out", tmp_path / "o.jsonl")
    message = refused(*arguments, named=("model.hf=models/tiny", str(copy / "recipe.yaml"),
                                         str(tmp_path), "does not exist"))
    assert not message.startswith("megatron-irl: --reference")
    refused(*arguments, "--reference", tmp_path, named=(f"--reference {tmp_path}", "config.json"))
    assert run(*arguments, "--reference", hf).code == 0


def test_one_run_over_sets_of_many_forms(sections, tmp_path, no_report):
    """Trained with nothing said but where they are; a share held out, one source twice.

    The first file has records that nobody answered, as the real one does.
    """
    from tests.cli.harness import write_recipe

    sets = [make(folder) for make in hub_files.FILES
            for folder in [tmp_path / make.__name__] if folder.mkdir() is None]
    unanswered = [{"instruction": f"Nothing {i}", "input": "", "output": ""} for i in range(3)]
    first = sets[0][0]
    first.write_text(json.dumps([*unanswered, *json.loads(first.read_text())], indent=4))
    count = sum(len(expected) for _, expected in sets) + len(sets[0][1])
    paths = [str(path) for path, _ in sets]
    # The model's own template, one that knows tools.
    folder = edited_copy(Path(sections["model"]["hf"]), tmp_path / "model",
                         max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text(RICH)
    sections["model"]["hf"] = str(folder)
    sections["data"] = {
        "train": [{"path": paths[0], "weight": 2.0}, *paths[1:]], "split": {"eval": 0.2, "seed": 1},
        "max_prompt_length": 300, "max_response_length": 100,
    }
    sections["generation"]["max_new_tokens"] = 4
    sections["algorithm"] |= {"rounds": 1, "steps_per_round": 1}
    sections["output_dir"] = "~/run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        result = run("train", write_recipe(tmp_path / "recipe.yaml", **sections))
        assert result.code == 0, result.err
        again = run("train", tmp_path / "recipe.yaml")
    assert "is finished" in again.err and again.code == 0, again.err
    assert (tmp_path / "run" / "hf").is_dir() and not os.path.exists("~")
    for path in paths:
        assert f"{path}: " in result.err
    # Each on the side that its content puts it on, and named there.
    left_out = [line for line in result.err.splitlines() if "have an empty answer" in line]
    assert sum(line.count(f"{first}:") for line in left_out) == len(unanswered)
    assert f"{first}:2" in "".join(left_out)
    (trained,) = [line for line in result.err.splitlines() if "data.train: " in line]
    (held,) = [line for line in result.err.splitlines() if "data.eval: " in line]
    numbers = [int(line.split(": ")[2].split()[0]) for line in (trained, held)]
    assert count - len(sets[0][1]) <= sum(numbers) <= count and min(numbers) > 0
