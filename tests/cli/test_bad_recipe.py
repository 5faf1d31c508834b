"""Recipes that cannot run: code 2, one message with the value and the way out, nothing written."""

import json

import pytest
from transformers import AutoTokenizer

from megatron_irl.data.tokenizer import fitted, load_tokenizer
from tests.cli.harness import edited_copy, refused, run, write_jsonl, write_recipe


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("algorithm.bta=0.2", ("algorithm.bta", "algorithm.beta")),
        ("algoritm.beta=0.2", ("algoritm", "algorithm")),
        ("optimizer.weight_deca=0.1", ("optimizer.weight_deca", "optimizer.weight_decay")),
        ("model.atention_dropout=0.1", ("model.atention_dropout", "model.attention_dropout")),
        ("ddp.overlap_grad_reduc=true", ("ddp.overlap_grad_reduc", "ddp.overlap_grad_reduce")),
        ("ddp.average_in_collective=true", ("ddp.average_in_collective=true", "Remove")),
        ("generation.kv_cache_gb=1e-9", ("generation.kv_cache_gb=1e-09", "one sequence needs")),
        ("model.num_layers=4", ("model.num_layers=4", "config.json", "2", "Remove")),
        ("algorithm.rounds=two", ("algorithm.rounds", "'two'", "an integer")),
        ("algorithm.rounds=0", ("algorithm.rounds=0", "1 or more")),
        ("algorithm.name=ppo", ("algorithm.name=ppo", "sft", "irft", "spin")),
        ("algorithm.beta=[0.1,0.2,0.3]", ("algorithm.beta", "algorithm.rounds=2", "3 values")),
        ("algorithm.beta=-1", ("algorithm.beta=-1", "above 0")),
        ("optimizer.lr=-1", ("optimizer.lr=-1", ">= 0")),
        ("optimizer.lr=fast", ("optimizer.lr='fast'",)),
        ("optimizer.optimizer=adamax", ("adamax",)),
        ("train.global_batch_size=3", ("train.global_batch_size=3", "train.micro_batch_size=2")),
        ("precision=fp8", ("precision=fp8", "CPU", "bf16 or fp32")),
        ("precision=fp16", ("precision=fp16", "fp32, bf16, fp8")),
        ("parallel.context_parallel_size=2", ("parallel.context_parallel_size=2", "Set it to 1")),
        ("data.max_prompt_length=250", ("data.max_prompt_length=250", "256", "lower")),
        ("generation.max_new_tokens=250", ("250", "generation.max_new_tokens")),
        ("data.train=nowhere.jsonl", ("data.train=nowhere.jsonl", "matches no file")),
        ("data.tokenizer=nowhere", ("tokenizer=nowhere", "does not exist")),
        ("data.chat_template=nowhere.jinja", ("data.chat_template=nowhere.jinja",)),
        ("model.hf=nowhere", ("model.hf=nowhere", "not a folder")),
        ("seed", ("'seed'", "section.key=value")),
    ],
)
def test_value_is_refused(recipe, tmp_path, monkeypatch, override, named):
    monkeypatch.setenv("RANK", "0")  # as one rank of a launcher: nothing is started from here
    monkeypatch.setenv("WORLD_SIZE", "2" if "context" in override else "1")
    refused("train", recipe, override, named=named)
    if override != "precision=fp8":  # which may be planned where it cannot run
        refused("plan", recipe, override, named=named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {hf: a", ("recipe.yaml", "not YAML", "line")),
        ("- a\n- b\n", ("recipe.yaml", "mapping")),
        ("model: {hf: a}\nmodel: {hf: b}\n", ("model", "twice")),
        ("model: {hf: a}\n", ("data.train", "algorithm.name", "output_dir", "missing")),
        ("", ("recipe.yaml", "mapping")),
    ],
)
def test_file_is_refused(tmp_path, text, named):
    (tmp_path / "recipe.yaml").write_text(text)
    refused("train", tmp_path / "recipe.yaml", named=named)


def test_missing_recipe(tmp_path):
    refused("train", tmp_path / "none.yaml", named=("none.yaml", "does not exist"))


@pytest.mark.parametrize(
    ("config", "sizes", "world", "named"),
    [
        ({}, {"tensor": 3}, 3, ("tensor_model_parallel_size=3", "num_attention_heads=4", "1 or 2")),
        ({}, {"tensor": 4}, 4, ("tensor_model_parallel_size=4", "num_query_groups=2", "1 or 2")),
        ({"intermediate_size": 65}, {"tensor": 2}, 2, ("ffn_hidden_size=65",)),
        ({}, {"pipeline": 3}, 3, ("pipeline_model_parallel_size=3", "num_layers=2", "1 or 2")),
        ({}, {"tensor": 2}, 3, ("world_size=3", "tensor_model_parallel_size=2", "2 or 4")),
        ({}, {"tensor": 2, "pipeline": 2}, 2, ("world_size=2", "takes 4 ranks", "Start 4")),
    ],
)
def test_layout_is_refused(recipe, model, tmp_path, monkeypatch, config, sizes, world, named):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    folder = edited_copy(model, tmp_path / "edited", **config)
    layout = [f"parallel.{name}_model_parallel_size={size}" for name, size in sizes.items()]
    batch = f"train.global_batch_size={4 * world}"
    refused("train", recipe, f"model.hf={folder}", batch, *layout, named=named)
    assert not (tmp_path / "run").exists()


def test_world_size_that_is_no_number(recipe, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "many")
    refused("train", recipe, named=("WORLD_SIZE=many",))


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([], ("train.jsonl", "no records")),
        (['{"prompt": "a"'], ("train.jsonl:1", "not JSON")),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], ("train.jsonl:2", '"response"')),
        ([{"messages": [{"role": "user", "content": "x"}]}], ("train.jsonl:1", "assistant")),
        ([{"messages": []}], ("train.jsonl:1", "empty")),
        ([{"prompt": "a", "response": ""}], ("train.jsonl:1", "response")),
        ([["a"]], ("train.jsonl:1", "JSON object")),
        ([{"prompt": "a", "response": "b<|im_end|>c"}], ("train.jsonl:1", "end-of-response")),
        ([{"prompt": "a", "response": "much too long"}],
         ("no demonstration is left", "dropped 1", "data.max_response_length=8")),
    ],
)
def test_demonstrations_are_refused(recipe, tmp_path, records, named):
    path = write_jsonl(tmp_path / "train.jsonl", records)
    refused("train", recipe, f"data.train={path}", named=named)
    assert not (tmp_path / "run").exists()


def test_overlong_demonstrations_are_counted_or_refused(recipe, tmp_path, monkeypatch, no_report):
    good = [{"prompt": "a", "response": str(i)} for i in range(4)]
    long = [{"prompt": "a", "response": "0123456789"}, {"prompt": "b" * 60, "response": "x"}]
    path = write_jsonl(tmp_path / "train.jsonl", good + long)
    options = (f"data.train={path}", "algorithm.rounds=1", "data.eval=[]")
    named = ("train.jsonl:5", "11 tokens", "train.jsonl:6", "data.max_prompt_length=48", "drop")
    refused("train", recipe, *options, "data.overlong=error", named=named)
    assert not (tmp_path / "run").exists()
    result = run("train", recipe, *options)
    assert result.code == 0, result.err
    assert "4 demonstrations" in result.err and "dropped 2 over-long" in result.err


def test_tokenizer_without_chat_template(recipe, model, tmp_path):
    folder = edited_copy(model, tmp_path / "edited")
    (folder / "chat_template.jinja").unlink()
    refused("train", recipe, f"model.hf={folder}", named=("no chat template", "data.chat_template"))
    assert not (tmp_path / "run").exists()


def test_tokenizer_of_another_model(recipe, model, tmp_path):
    folder = edited_copy(model, tmp_path / "edited", vocab_size=64)
    refused("train", recipe, f"model.hf={folder}", f"data.tokenizer={model}",
            named=("64",))
    assert not (tmp_path / "run").exists()


def test_tokens_that_the_embedding_does_not_have(sections, model, data, tmp_path, no_report):
    """Harmless while no text uses one; a padding token of that kind is the end of turn instead."""
    folder = edited_copy(model, tmp_path / "edited", pad_token_id=128)
    hf = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    hf.add_tokens([f"<spare{i}>" for i in range(rows - len(hf) + 2)])
    hf.add_special_tokens({"pad_token": "[PAD]"})
    hf.save_pretrained(folder)
    sections["model"]["hf"] = str(folder)
    sections["algorithm"] = {"name": "sft", "rounds": 1, "steps_per_round": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections)
    extra = hf.convert_tokens_to_ids("[PAD]") - 1
    assert extra >= rows
    last = hf.convert_ids_to_tokens(extra)
    lines = [{"prompt": "1+1", "response": "2"}, {"prompt": f"1{last}", "response": "2"},
             {"messages": [{"role": "user", "content": "1"},
                           {"role": "assistant", "content": f"a {last}"}]}]
    bad = write_jsonl(tmp_path / "bad.jsonl", lines)
    refused("train", recipe, f"data.train={bad}", named=(
        "2 records", f"{bad}:2: the token '{last}' has the id {extra}", f"{rows} rows",
        f"{bad}:3: the token"))
    prompts = write_jsonl(tmp_path / "p.jsonl", lines[1:2])
    generate = ("generate", "--model", folder, "--out", tmp_path / "o.jsonl",
                "--max-new-tokens", 2, "--prompts")
    refused(*generate, prompts, named=(f"{prompts}:1: the token '{last}'",))
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert f"warning: the tokenizer has {extra + 2} tokens, the model's embedding {rows}" in (
        result.err)
    assert run(*generate, write_jsonl(tmp_path / "q.jsonl", lines[:1])).code == 0
    assert load_tokenizer(folder).pad_id >= rows
    tokenizer = fitted(load_tokenizer(folder), rows)
    assert tokenizer.pad_id == tokenizer.eos_id < rows
    assert fitted(load_tokenizer(model), rows).embedding_rows is None


@pytest.mark.parametrize("what", ["folder", "file", "below a file"])
def test_output_folder_that_is_something_else(recipe, tmp_path, what):
    out = tmp_path / "other"
    if what == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    else:
        out.write_text("precious")
        out = out if what == "file" else out / "run"
    refused("train", recipe, f"output_dir={out}", named=(f"output_dir={out}", "Set output_dir"))
    kept = out / "thesis.txt" if what == "folder" else tmp_path / "other"
    assert kept.read_text() == "precious"
    if what == "folder":
        assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_unsupported_architecture(recipe, model, tmp_path):
    folder = edited_copy(model, tmp_path / "edited", architectures=["MambaForCausalLM"])
    refused("train", recipe, f"model.hf={folder}", named=("MambaForCausalLM", "LlamaForCausalLM"))
    assert not (tmp_path / "run").exists()


def test_sft_takes_no_pair_keys(sections, tmp_path):
    sections["algorithm"] = {"name": "sft", "beta": 0.1}
    path = write_recipe(tmp_path / "recipe.yaml", **sections)
    refused("train", path, named=("algorithm.beta", "sft", "Remove"))


@pytest.mark.parametrize("command", ["plan", "report"])
def test_other_commands(tmp_path, command):
    refused(command, tmp_path / "none", named=("none",))
