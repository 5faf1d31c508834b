"""What the ranks of the evaluation's tests run; importable by name."""

from pathlib import Path
from typing import Any

import numpy as np

import megatron_irl.hardware  # noqa: F401  (must precede megatron)
from megatron_irl.console import Console
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError
from megatron_irl.evaluation.text_model import TextModel
from megatron_irl.evaluation.texts import encode_texts
from megatron_irl.parallel.main_rank import led_by_main
from megatron_irl.policy.policy import Policy
from tests.dist.jobs import Layout, build


def answers(
    hf: str, layout: Layout, pairs: list[tuple[str, str]], texts: list[str], prompts: list[str],
    until: list[str], max_new_tokens: int,
) -> dict[str, Any]:
    """What a policy says of pairs and texts and to prompts, asked by rank 0 alone."""
    topology, chunks, _, arch = build(hf, layout)
    tokenizer = load_tokenizer(Path(hf))
    model = TextModel(Policy(chunks, topology, arch), tokenizer, Console(enabled=False))
    deeds = {name: getattr(model, name)
             for name in ("loglikelihoods", "text_loglikelihoods", "respond_with")}

    def work(ask: Any) -> dict[str, Any]:
        ids = [np.array(i, np.int32) for i in encode_texts(tokenizer, prompts)]
        return {
            "pairs": ask("loglikelihoods", pairs),
            "texts": ask("text_loglikelihoods", texts),
            "free": ask("respond_with", ids, (max_new_tokens, 0.0, 1.0, 0, ())),
            "until": ask("respond_with", ids, (max_new_tokens, 0.0, 1.0, 0, tuple(until))),
        }

    def failing(ask: Any) -> None:
        ask("text_loglikelihoods", texts[:1])
        raise UserError("of the main rank")

    def deed_fails(ask: Any) -> None:
        ask("respond_with", [np.ones(3, np.int32)], (10**6, 0.0, 1.0, 0, ()))

    found = led_by_main(work, deeds, topology)
    return {"found": found} | {
        what.__name__: _error(lambda w=what: led_by_main(w, deeds, topology))
        for what in (failing, deed_fails)
    }


def _error(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "nothing was raised"
