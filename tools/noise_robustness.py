"""Does the learned reward tell clean demonstrations from corrupted ones? Explicit and implicit.

    python tools/noise_robustness.py --out runs/noise

A small language model learns to write a word backwards, and a quarter of the demonstrations are
corrupted: their answers are shuffled between prompts. All methods start from one short SFT run on
the corrupted set, which knows the form of an answer and not the task, and take as many steps on the
same demonstrations: more SFT, IRFT, RFT, and SFT on what ``megatron-irl filter`` keeps of RFT's
ledger. The start matters: a reward tells demonstrations from the samples it has seen, so it learns
to dislike wrong answers from a policy that gives them. For each seed:

- AUC: the chance that a held-out prompt with its own answer earns more reward than one with
  another prompt's answer (ties count half); of RFT's reward head, of IRFT's implicit reward, and
  of the log-ratio of the further SFT to its start, which is no learned reward, for comparison;
- the same over the training rows, from the ledger;
- held-out exact match of greedy answers.

Everything runs through the commands ``train``, ``score`` and ``filter``. Stopped at any time, the
same command goes on where it was.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_irl.cli import main as cli
from megatron_irl.data.ledger import read_ledger
from megatron_irl.run.comparison import compare_table
from megatron_irl.run.runlog import RunLog
from megatron_irl.storage.commit import write_jsonl_atomically

LETTERS = "abcdefgh"
WORD_LENGTH = 4
CORRUPTED = 0.25
ROUNDS = 4
METHODS = ("sft", "irft", "rft", "sft_filtered")


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama whose tokens are letters, as an HF folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<eos>", "<bos>", *LETTERS, "="]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def make_data(folder: Path, seed: int, num_train: int, num_heldout: int) -> None:
    """``train.jsonl`` (a quarter corrupted), ``eval.jsonl`` (clean), ``heldout.jsonl`` (to score).

    A line of ``heldout.jsonl`` has the word's own answer and another held-out word's. The field
    ``corrupted`` is for the measurement; training does not read it.
    """
    rng = random.Random(seed)
    words: set[str] = set()
    while len(words) < num_train + num_heldout:
        words.add("".join(rng.choice(LETTERS) for _ in range(WORD_LENGTH)))
    shuffled = sorted(words)
    rng.shuffle(shuffled)
    train, heldout = shuffled[:num_train], shuffled[num_train:]
    answers = {word: word[::-1] for word in train}
    victims = rng.sample(train, round(CORRUPTED * num_train))
    answers |= dict(zip(victims, (w[::-1] for w in _rotated(victims)), strict=True))
    write_jsonl_atomically(folder / "train.jsonl", [
        {"prompt": word + "=", "response": answers[word], "corrupted": answers[word] != word[::-1]}
        for word in train
    ])
    write_jsonl_atomically(folder / "eval.jsonl", [
        {"prompt": word + "=", "response": word[::-1], "answer": word[::-1]} for word in heldout
    ])
    write_jsonl_atomically(folder / "heldout.jsonl", [
        {"prompt": word + "=", "responses": [word[::-1], other[::-1]]}
        for word, other in zip(heldout, _rotated(heldout), strict=True)
    ])


def _rotated(words: Sequence[str]) -> list[str]:
    """Each word's place taken by the next: a shuffle that leaves nothing where it was."""
    return [*words[1:], *words[:1]]


def recipes(folder: Path, model: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of every run of a seed, by name."""
    def recipe(start: Path, lr: float, **sections: Any) -> dict[str, Any]:
        return {
            "model": {"hf": str(start)},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"),
                     "max_prompt_length": 16, "max_response_length": 8},
            "evaluation": {"samples": False, "interval": "end"},
            "train": {"micro_batch_size": options.batch, "global_batch_size": options.batch},
            "optimizer": {"lr": lr, "weight_decay": 0.0},
            "logging": {"tensorboard": False, "interval": 100},
            "precision": "fp32", "seed": seed, **sections,
        }

    base, per_round = folder / "base" / "hf", options.steps // ROUNDS
    sft = {"name": "sft", "steps_per_round": options.steps}
    made = {
        "base": recipe(model, options.base_lr,
                       algorithm={"name": "sft", "steps_per_round": options.base_steps}),
        "sft": recipe(base, options.lr, algorithm=sft),
        "irft": recipe(base, options.lr, algorithm={
            "name": "irft", "rounds": ROUNDS, "steps_per_round": per_round, "beta": 0.1,
            "nll_coefficient": options.anchor, "reference": "initial"}),
        "rft": recipe(base, options.lr, algorithm={
            "name": "rft", "rounds": ROUNDS, "reward_steps": per_round,
            "policy_steps": options.policy_steps, "beta": 0.05,
            "nll_coefficient": options.anchor},
            reward={"lr": options.head_lr, "mix_rounds": ROUNDS - 1},
            policy={"samples_per_prompt": 4}),
        "sft_filtered": recipe(base, options.lr, algorithm=sft),
    }
    made["sft_filtered"]["data"]["train"] = str(folder / "kept.jsonl")
    for name, mapping in made.items():
        mapping["output_dir"] = str(folder / name)
    return made


def command(*arguments: Any) -> None:
    """Run a command of the product in this process; stop with its exit code if it fails."""
    code = cli([str(argument) for argument in arguments])
    if code:
        sys.exit(code)


def run_seed(folder: Path, model: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score everything for one seed; returns its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "heldout.jsonl").exists():
        make_data(folder, seed, options.train, options.heldout)
    for name, recipe in recipes(folder, model, seed, options).items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        if name == "sft_filtered" and not (folder / "kept.jsonl").exists():
            command("filter", folder / "rft", "--out", folder / "kept.jsonl",
                    "--top-quantile", 1 - CORRUPTED)
        command("train", path)
    for name in ("rft", "irft", "sft"):
        out = folder / f"{name}_rewards.jsonl"
        reference = ["--reference", folder / "base" / "hf"] if name == "sft" else []
        if not out.exists():
            command("score", "--model", folder / name, "--pairs", folder / "heldout.jsonl",
                    "--out", out, *reference)
    return read_results(folder)


def read_results(folder: Path) -> dict[str, Any]:
    """AUCs, and the evaluations of the runs, from the files of a seed."""
    auc = {}
    for name in ("rft", "irft", "sft"):
        rewards = np.array([line["rewards"] for line in _lines(folder / f"{name}_rewards.jsonl")])
        auc[name] = area_under_curve(rewards[:, 0], rewards[:, 1])
    corrupted = np.array([line["corrupted"] for line in _lines(folder / "train.jsonl")])
    ledger = np.array([row.reward for row in read_ledger(folder / "rft" / "ledger")])
    kept = _lines(folder / "kept.jsonl")
    return {
        "auc": auc,
        "auc_train_ledger": area_under_curve(ledger[~corrupted], ledger[corrupted]),
        "kept": len(kept), "kept_corrupted": sum(line["corrupted"] for line in kept),
        "evaluation": {name: RunLog(folder / name).read_rounds()[-1]["evaluation"]
                       for name in ("base", *METHODS)},
    }


def area_under_curve(clean: np.ndarray, corrupted: np.ndarray) -> float:
    """Chance that a clean row's reward is above a corrupted row's; ties count half."""
    difference = clean[:, None] - corrupted[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(results: Mapping[str, Mapping[str, Any]], num_heldout: int) -> str:
    """The tables: AUC over seeds, then exact match seed by seed."""
    lines = [f"AUC on {num_heldout} clean and {num_heldout} corrupted held-out rows",
             "(mean, standard deviation over seeds, each seed):"]
    columns = [(title, [result["auc"][name] for result in results.values()]) for title, name in (
        ("explicit (rft)", "rft"), ("implicit (irft)", "irft"), ("log-ratio (sft)", "sft"))]
    columns.append(("ledger, training rows",
                    [result["auc_train_ledger"] for result in results.values()]))
    for title, values in columns:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(f"  {title:22s} {statistics.mean(values):.3f}  {spread:.3f}  "
                     + "  ".join(f"{value:.3f}" for value in values))
    for seed, result in results.items():
        lines += ["", f"{seed}: filter kept {result['kept']} rows, "
                  f"{result['kept_corrupted']} of them corrupted",
                  compare_table(list(result["evaluation"].items()))]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/noise"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=1024, help="demonstrations")
    parser.add_argument("--heldout", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--base-steps", type=int, default=40)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=384, help=f"a multiple of {ROUNDS}")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--head-lr", type=float, default=1e-2)
    parser.add_argument("--policy-steps", type=int, default=8, help="of RFT, each round")
    parser.add_argument("--anchor", type=float, default=1.0, help="NLL coefficient of IRFT and RFT")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    model = out / "model"
    if not (model / "tokenizer.json").exists():
        make_model(model, options.hidden, options.layers)
    results = {f"seed {seed}": run_seed(out / f"seed_{seed}", model, seed, options)
               for seed in options.seeds}
    (out / "results.json").write_text(json.dumps(results, indent=2))
    text = summary(results, options.heldout)
    (out / "results.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
