"""lm-eval's side of a policy. Importing this module imports lm-eval, an extra."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.evaluation.texts import encode_texts, render_chat

DEFAULT_MAX_NEW_TOKENS = 256  # lm-eval's, for tasks that do not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Ask = Callable[..., Any]
"""(name of a method of ``TextModel``, *arguments) → its result, from all ranks together."""


class PolicyModel(LM):
    """The model that lm-eval asks, on the main rank.

    Args:
        ask: Reaches the policy on its ranks.
        tokenizer: The model's.
        name: Of the model, for lm-eval's cache of rendered requests.
        max_new_tokens: Of tasks that do not say.
    """

    def __init__(
        self, ask: Ask, tokenizer: Tokenizer, *, name: str = "",
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> None:
        super().__init__()
        self._ask, self._tokenizer, self._name = ask, tokenizer, name
        self._max_new_tokens = max_new_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return self._ask("loglikelihoods", [tuple(request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return self._ask("text_loglikelihoods", [request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, those with the same settings together."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(place)
        for settings, places in groups.items():
            ids = encode_texts(self._tokenizer, [requests[i].args[0] for i in places])
            first = [self._tokenizer.eos_id]  # an empty prompt has nothing to go on from
            prompts = [np.array(each or first, np.int32) for each in ids]
            found = self._ask("respond_with", prompts, settings)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers

    def _settings(self, asked: dict[str, Any]) -> tuple[Any, ...]:
        """(max_new_tokens, temperature, top_p, top_k, until)."""
        until = asked.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        length = next((asked[key] for key in LENGTHS if asked.get(key) is not None),
                      self._max_new_tokens)
        temperature = float(asked.get("temperature") or 0.0)
        sampled = asked.get("do_sample", temperature > 0)
        if sampled and temperature == 0:
            temperature = 1.0
        return (int(length), temperature if sampled else 0.0, float(asked.get("top_p") or 1.0),
                int(asked.get("top_k") or 0), tuple(text for text in until if text))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; one that ends within an answer is cut where that ends."""
        return render_chat(self._tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._name
