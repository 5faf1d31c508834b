"""The options of ``evaluate``; light, since every command's parser is built at each start."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from megatron_irl.config.schema import FormatName


def add_evaluate_options(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Add what ``evaluate`` takes beside the model's own options."""
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--tasks", metavar="NAME,...", help="tasks, groups or tags of lm-eval; "
                       "paper: the six of the paper with their shots; leaderboard: with MMLU 5")
    tasks.add_argument("--include-path", type=path, metavar="DIR", help="folder of task files "
                       "(YAML) of your own; they come before lm-eval's of the same name")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt "
                       "(default: the task's own)")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    tasks.add_argument("--gen-kwargs", default="", metavar="KEY=VALUE,...", help="generation "
                       "settings of tasks that generate, as lm-eval's")
    tasks.add_argument("--fewshot-as-multiturn", action="store_true", help="with "
                       "--apply-chat-template: each example is a turn of its own")
    tasks.add_argument("--log-samples", action="store_true", help="write every prompt and answer "
                       "of the tasks beside the results, as .samples.jsonl")
    tasks.add_argument("--offline", action="store_true", help="let nothing of Hugging Face reach "
                       "for the network: data come from its cache or from local files")

    sets = parser.add_argument_group("sets of your own (JSONL and what train reads)")
    sets.add_argument("--harmful", type=path, metavar="FILE", help="prompts to be refused")
    sets.add_argument("--harmless", type=path, metavar="FILE", help="prompts to be answered")
    sets.add_argument("--stereotypes", type=path, metavar="FILE", help='{"sent_more", "sent_less"} '
                      "pairs, as CrowS-Pairs: which sentence is likelier")
    sets.add_argument("--toxicity", metavar="MODULE:FUNCTION", help="your scorer: a list of texts "
                      "to as many numbers in [0, 1]")
    sets.add_argument("--toxicity-prompts", type=path, metavar="FILE", help="prompts whose answers "
                      "it scores")
    sets.add_argument("--preferences", type=path, metavar="FILE", help='{"prompt", "chosen", '
                      '"rejected"} records: the reward\'s accuracy, calibration, bias by length')
    sets.add_argument("--reference", type=path, help="of an implicit reward, as of score")
    sets.add_argument("--beta", type=float, help="likewise")
    sets.add_argument("--max-new-tokens", type=int, default=256, help="of an answer to a prompt")
    sets.add_argument("--format", choices=get_args(FormatName), default="auto",
                      help="form of the records, as data.format")
    sets.add_argument("--field", action="append", metavar="OURS=THEIRS", help="a field of "
                      "another name, as data.fields; may be given several times")

    parser.add_argument("--apply-chat-template", action="store_true", help="ask through the "
                        "model's chat template; also prompts that are strings")
    parser.add_argument("--system", metavar="TEXT", help="system turn, with --apply-chat-template")
    parser.add_argument("--before", metavar="DIR", help="HF folder to compare with, or none "
                        "(default: the model the run started from)")
    parser.add_argument("--out", type=path, help="JSON file (default: in the run folder, "
                        "evaluation/...json)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
