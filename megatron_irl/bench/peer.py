"""The same round as people write it without us, with transformers alone, on one device."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_irl import hardware
from megatron_irl.bench.phases import BETA
from megatron_irl.bench.timing import median_seconds
from megatron_irl.bench.work import Case, PhaseMemory, random_pairs
from megatron_irl.types import Pair


class Peer:
    """``generate``, padded reference passes, and padded pairwise steps with AdamW.

    The loss as one writes it: logits of all positions, in fp32. In bf16 weights and AdamW's moments
    are bf16 and nothing else, which takes less memory than ours and is less exact.

    Args:
        random_weights: Of the folder's config.json; else the folder's.
    """

    def __init__(self, case: Case, *, random_weights: bool) -> None:
        self.case, self.memory = case, PhaseMemory()
        self.dtype = torch.float32 if case.recipe.precision == "fp32" else torch.bfloat16
        self.model: Any = self._load(self.dtype, random_weights=random_weights)
        self.vocab_size = self.model.config.vocab_size

    def _load(self, dtype: torch.dtype, *, random_weights: bool) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = Path(self.case.recipe.model.hf)
        with torch.device(hardware.device()):
            if random_weights:
                config = AutoConfig.from_pretrained(folder)
                return AutoModelForCausalLM.from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=learning_rate(self.case),
                                 weight_decay=0.0, fused=True)

    def run(self, phase: str) -> dict[str, Any]:
        """As ``Bench.run``; saving has no counterpart."""
        self.memory.begin()
        return {"phase": phase} | getattr(self, f"_{phase}")() | self.memory.peaks()

    def _pairs(self, count: int, seed: int) -> list[Pair]:
        return random_pairs(self.vocab_size, count, self.case.prompt, self.case.response, seed=seed)

    def _generate(self) -> dict[str, Any]:
        from transformers import GenerationConfig

        case, new = self.case, self.case.response.high
        prompts = [torch.from_numpy(p.prompt_ids).long() for p in self._pairs(case.requests, 0)]
        most = case.recipe.generation.max_requests
        self.model.eval()
        options = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                   eos_token_id=None, pad_token_id=0, max_new_tokens=new)

        def sample() -> None:
            for start in range(0, len(prompts), most):
                part = prompts[start : start + most]
                ids = pad_sequence([p.flip(0) for p in part], batch_first=True).flip(1)
                there = pad_sequence([torch.ones_like(p) for p in part], batch_first=True).flip(1)
                with torch.inference_mode():
                    self.model.generate(
                        ids.to(hardware.device()), generation_config=options,
                        attention_mask=there.to(hardware.device()))

        seconds = median_seconds(lambda _: sample(), case)
        return {"seconds": seconds, "tokens_per_second": case.requests * new / seconds}

    def _reference(self) -> dict[str, Any]:
        pairs, size = self._pairs(self.case.requests, 0), self.case.recipe.train.micro_batch_size
        self.model.eval()

        def score(_: int) -> None:
            with torch.inference_mode():
                for start in range(0, len(pairs), size):
                    self._logps(pairs[start : start + size])

        seconds = median_seconds(score, self.case)
        return {"seconds": seconds, "tokens_per_second": tokens_of(pairs) / seconds}

    def _train(self) -> dict[str, Any]:
        batch = self.case.recipe.train.global_batch_size
        size = self.case.recipe.train.micro_batch_size
        self.model.train()

        def step(seed: int) -> None:
            pairs = by_length(self._pairs(batch, seed))
            self._optimizer.zero_grad()
            for start in range(0, batch, size):
                logps = self._logps(pairs[start : start + size])
                ratios = logps + 50.0  # the cached reference
                margins = BETA * (ratios[0::2] - ratios[1::2])
                (-torch.nn.functional.logsigmoid(margins).sum() / batch).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()

        seconds = median_seconds(step, self.case)
        return {"seconds": seconds, "tokens_per_second": tokens_of(self._pairs(batch, 0)) / seconds}

    def _logps(self, pairs: list[Pair]) -> torch.Tensor:
        """[2 P] summed response log-probabilities, of a right-padded batch."""
        both = [(p.prompt_ids, ids) for p in pairs for ids in (p.demo_ids, p.sample_ids)]
        rows = [torch.cat([torch.from_numpy(a), torch.from_numpy(b)]).long() for a, b in both]
        counted = [torch.cat([torch.zeros(len(a)), torch.ones(len(b))]) for a, b in both]
        tokens = pad_sequence(rows, batch_first=True).to(hardware.device())
        there = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(tokens.device)
        mask = pad_sequence(counted, batch_first=True).to(tokens.device)
        logits = self.model(input_ids=tokens, attention_mask=there).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (logprobs * mask[:, 1:]).sum(-1)


def by_length(pairs: list[Pair]) -> list[Pair]:
    """Short ones first, so that little is padded in a microbatch."""
    return sorted(pairs, key=lambda pair: tokens_of([pair]))


def learning_rate(case: Case) -> float:
    """Of the recipe."""
    return float(case.recipe.optimizer.get("lr", 5e-7))


def tokens_of(pairs: list[Pair]) -> int:
    return sum(2 * len(p.prompt_ids) + len(p.demo_ids) + len(p.sample_ids) for p in pairs)
