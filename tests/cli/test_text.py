"""What is trained on is what the template says: runs against transformers on the rendered text."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.cli.conftest import small_recipe
from tests.cli.harness import edited_copy, read_jsonl, refused, run, write_jsonl, write_recipe
from tests.cli.test_resume import Killed, kill_after
from tests.unit.data.shapes import CITIES, TEMPLATES, write_tokenizer


def model_of(folder: Path, kind: str, template: str) -> Path:
    """A tiny random Llama with one of the rebuilt tokenizers."""
    write_tokenizer(folder, kind, template)
    vocab = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def records(turns: int = 1):
    """Conversations about capitals; a leading space in some answers is the record's own."""
    found = []
    for country, city in CITIES.items():
        messages = []
        for number in range(turns):
            messages += [{"role": "user", "content": f"What is the capital of {country}?"},
                         {"role": "assistant", "content": f"{city} is the capital{'.' * number}"}]
        found.append({"messages": messages, "answer": messages[-1]["content"]})
    return found


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("zephyr") / "m", "zephyr", TEMPLATES["zephyr"])


def recipe_of(tmp_path, model, lines, name="sft", **sections):
    path = write_jsonl(tmp_path / "d.jsonl", lines)
    mapping = small_recipe(model, {"train": path, "eval": path}, tmp_path / "run")
    mapping["data"] |= {"max_prompt_length": 200, "max_response_length": 48}
    mapping["algorithm"] = {"name": name, "rounds": 1, "steps_per_round": 2}
    if name != "sft":
        mapping["algorithm"]["beta"] = 0.1
    for section, keys in sections.items():
        mapping[section] = mapping.get(section, {}) | keys
    return write_recipe(tmp_path / "r.yaml", **mapping)


def transformers_nll(folder, conversations):
    """Nats a token of every assistant turn, its end included, on the rendered text."""
    hf, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32)
    total = count = 0
    for messages in conversations:
        text = hf.apply_chat_template(messages, tokenize=False)
        encoded = hf(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits.float().log_softmax(-1)[0]
        position = 0
        for message in (m for m in messages if m["role"] == "assistant"):
            header = "<|assistant|>\n"
            start = text.index(header, position) + len(header)
            assert text[start:].startswith(message["content"])
            position = text.index("</s>", start) + len("</s>")
            for row, (first, last) in enumerate(encoded["offset_mapping"]):
                if first >= start and last <= position and last > first:
                    total -= float(logps[row - 1, ids[0, row]])
                    count += 1
    return total / count, count


@pytest.mark.parametrize("name", ["sft", "irft"])
def test_heldout_likelihood_is_that_of_the_rendered_text(zephyr, tmp_path, no_report, name):
    lines = records()
    result = run("train", recipe_of(tmp_path, zephyr, lines, name))
    assert result.code == 0, result.err
    (line,) = read_jsonl(tmp_path / "run" / "rounds.jsonl")
    for folder, numbers in ((zephyr, line["evaluation_before"]),
                            (tmp_path / "run" / "hf", line["evaluation"])):
        nll, count = transformers_nll(folder, [r["messages"] for r in lines])
        assert numbers["nll_tokens"] == count
        assert numbers["nll"] == pytest.approx(nll, abs=1e-4)


def test_every_turn_is_learnt_in_one_sequence(zephyr, tmp_path, no_report):
    lines = records(turns=3)
    recipe = recipe_of(tmp_path, zephyr, lines, data={
        "turns": "all", "max_prompt_length": 110, "max_response_length": 140}, train={
        "global_batch_size": len(lines), "micro_batch_size": len(lines)},
        optimizer={"lr": 0.0}, algorithm={"steps_per_round": 1})
    result = run("train", recipe)
    assert result.code == 0, result.err
    nll, count = transformers_nll(zephyr, [r["messages"] for r in lines])
    (step,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert step["loss"] == pytest.approx(nll, abs=1e-4)
    (line,) = read_jsonl(tmp_path / "run" / "rounds.jsonl")  # held out: each turn by itself
    assert line["evaluation"]["nll_tokens"] == count
    assert line["evaluation"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert line["evaluation"]["num_answers"] == len(lines)
    refused("train", recipe, "algorithm.name=irft", named=("data.turns=all", "each"))


def test_what_generate_writes_scores_as_it_was_generated(zephyr, tmp_path, no_report):
    prompts = [{"prompt": r["messages"][:1]} for r in records()] + [{"prompt": "Rome is"}]
    source = write_jsonl(tmp_path / "p.jsonl", prompts)
    result = run("generate", "--model", zephyr, "--prompts", source, "--out", tmp_path / "g.jsonl",
                 "--max-new-tokens", 8, "--precision", "fp32")
    assert result.code == 0, result.err
    hf = AutoTokenizer.from_pretrained(zephyr)
    for line in read_jsonl(tmp_path / "g.jsonl"):
        if line["finish_reason"] != "stop" or "\ufffd" in line["response"]:
            continue
        prompt = line["prompt"]
        text = prompt + line["response"] + "</s>" if isinstance(prompt, str) else (
            hf.apply_chat_template([*prompt, {"role": "assistant", "content": line["response"]}],
                                   tokenize=False).rstrip("\n"))
        ids = hf(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        assert ids[-len(line["token_ids"]) :] == line["token_ids"]


@pytest.mark.parametrize(("listed", "expected"), [
    ({"generation_config.json": 0}, [1, 0]), ({"generation_config.json": [2, 0]}, [1, 2, 0]),
    ({}, None), ({"generation_config.json": [0, 1]}, [0, 1]), ({"generation_config.json": None}, 1),
])
def test_the_exported_model_stops_where_training_ended_turns(
    model, data, tmp_path, no_report, listed, expected
):
    folder = edited_copy(model, tmp_path / "m")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, value in listed.items():
        (folder / name).write_text(json.dumps({"eos_token_id": value, "temperature": 0.5}))
    mapping = small_recipe(folder, data, tmp_path / "run")
    mapping["algorithm"] = {"name": "sft", "steps_per_round": 1}
    mapping["evaluation"] = {"interval": "never"}
    assert run("train", write_recipe(tmp_path / "r.yaml", **mapping)).code == 0
    written = tmp_path / "run" / "hf" / "generation_config.json"
    if expected is None:  # config.json says it already
        assert not written.exists()
    else:
        settings = json.loads(written.read_text())
        assert (settings["eos_token_id"], settings["temperature"]) == (expected, 0.5)
    stops = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "hf").generation_config.eos_token_id
    assert 1 in (stops if isinstance(stops, list) else [stops])


def interrupted(monkeypatch, recipe):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "megatron_irl.run.loop.optimizer_step", 1, after=True)
        run("train", recipe)


def test_a_chat_model_made_of_a_base_stops_by_itself_in_transformers(tmp_path, no_report):
    """Qwen's shape: the base stops at <|endoftext|>, its chat template ends turns with <|im_end|>.

    What learnt to end its turns must do so wherever the exported folder is used.
    """
    folder = write_tokenizer(tmp_path / "base", "qwen", TEMPLATES["qwen25"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    hf = AutoTokenizer.from_pretrained(folder)
    end, turn_end = hf.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(hf), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=end, pad_token_id=end))
    base.generation_config.eos_token_id = end
    base.save_pretrained(folder)
    lines = records()
    recipe = recipe_of(
        tmp_path, folder, lines, algorithm={"steps_per_round": 60}, optimizer={"lr": 1e-2},
        train={"global_batch_size": len(lines), "micro_batch_size": len(lines)},
        evaluation={"interval": "never"})
    assert run("train", recipe).code == 0
    exported = tmp_path / "run" / "hf"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [
        turn_end, end]
    hf, model = (of.from_pretrained(exported) for of in (AutoTokenizer, AutoModelForCausalLM))
    for record in lines:
        text = hf.apply_chat_template(
            record["messages"][:1], tokenize=False, add_generation_prompt=True)
        ids = hf(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)
        said = hf.decode(out[0, ids["input_ids"].shape[1] :])
        assert said == record["answer"] + "<|im_end|>"


def test_another_starting_model_is_noticed_by_resume_and_by_score(
    model, data, tmp_path, monkeypatch, no_report
):
    folder = edited_copy(model, tmp_path / "m")
    mapping = small_recipe(folder, data, tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    interrupted(monkeypatch, recipe)
    weights, config = folder / "model.safetensors", folder / "config.json"
    original, settings = weights.read_bytes(), config.read_bytes()
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.25)
    changed.save_pretrained(folder)
    assert weights.stat().st_size == len(original)
    refused("train", recipe, named=("another model.hf", str(tmp_path / "run")))
    weights.write_bytes(original)
    config.write_bytes(settings)
    assert run("train", recipe).code == 0
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1", "responses": ["2"]}])
    score = ("score", "--model", tmp_path / "run", "--pairs", pairs, "--out", tmp_path / "s.jsonl")
    assert run(*score).code == 0
    changed.save_pretrained(folder)
    refused(*score, "--overwrite", named=(str(folder), "not what", "digest"))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_another_tokenizer_template_or_configuration_is_named(
    model, data, tmp_path, monkeypatch, no_report, name
):
    folder = edited_copy(model, tmp_path / "m")
    recipe = write_recipe(tmp_path / "r.yaml", **small_recipe(folder, data, tmp_path / "run"))
    interrupted(monkeypatch, recipe)
    path = folder / name
    if name == "chat_template.jinja":
        path.write_text(path.read_text().replace("m['content']", "m['content'] + '.'"))
        named = "another chat template"
    elif name == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
        named = "another model.hf"
    else:
        tokenizer = json.loads(path.read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab["~"], vocab["!"] = vocab["!"], vocab["~"]
        path.write_text(json.dumps(tokenizer))
        named = "another tokenizer"
    refused("train", recipe, named=(named,))


def test_a_template_that_prints_the_date_goes_on_tomorrow(
    model, data, tmp_path, monkeypatch, no_report
):
    template = "{{ strftime_now('%d.%m.%Y') }}\n" + (model / "chat_template.jinja").read_text()
    mapping = small_recipe(model, data, tmp_path / "run")
    mapping["data"] |= {"chat_template": template, "max_prompt_length": 64}
    recipe = write_recipe(tmp_path / "r.yaml", **mapping)
    monkeypatch.setattr("megatron_irl.run.inputs.today", lambda: datetime(2024, 7, 1))
    interrupted(monkeypatch, recipe)
    monkeypatch.setattr("megatron_irl.run.inputs.today", lambda: datetime(2024, 7, 2))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start"]["date"].startswith(
        "2024-07-01")


def test_plan_shows_what_the_model_sees(zephyr, tmp_path, capsys):
    lines = [*records(turns=2), records()[0], records()[0]]
    recipe = recipe_of(tmp_path, zephyr, lines, data={"turns": "all", "max_prompt_length": 48,
                                                      "max_response_length": 80})
    assert run("plan", recipe, "--show", 1).code == 0
    out = capsys.readouterr().out
    prompt, response = (
        next(line for line in out.splitlines() if line.startswith(f"  {what}"))
        for what in ("prompt", "response"))
    assert "<|user|>\\nWhat is the capital of France?</s>" in prompt and "«" not in prompt
    shown = response.split("response  ")[1]
    assert shown.replace("«", "").replace("»", "").count("Paris is the capital") == 2
    counted = "".join(part.split("»")[0] for part in shown.split("«")[1:])
    assert counted == "Paris is the capital</s>Paris is the capital.</s>"
    assert "1 of the 7 kept are copies" in out
    assert "data.max_prompt_length=64 data.max_response_length=" in out
    assert "prompt tokens: shortest" in out and "of 7: 0 over data.max_prompt_length=48" in out
    refused("plan", recipe, "--show", -1, named=("--show -1",))
