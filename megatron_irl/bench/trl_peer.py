"""The same round by trl: its ``DPOTrainer`` scores the reference and trains; samples are
transformers'.
"""

import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from megatron_irl import hardware
from megatron_irl.bench.peer import Peer, by_length, learning_rate, tokens_of
from megatron_irl.bench.phases import BETA
from megatron_irl.bench.timing import median_seconds
from megatron_irl.bench.work import Case
from megatron_irl.types import Pair


class TrlPeer(Peer):
    """``DPOTrainer``'s own collator, reference pass, fused head, loss and training loop.

    Of its defaults one is changed, for the same work: activations are kept, not recomputed
    (``gradient_checkpointing``). Tokenising is left out, and pairs come in the order in which ours
    do. In bf16 it holds float32 weights and computes in bf16 (its ``bf16``), and samples from a
    copy in bf16, as an engine beside the trainer has one.
    """

    def __init__(self, case: Case, *, random_weights: bool) -> None:
        super().__init__(case, random_weights=random_weights)
        if self.dtype != torch.float32:
            self.model = self.model.float()  # as trl loads it

    def _generate(self) -> dict[str, Any]:
        if self.dtype == torch.float32:
            return super()._generate()
        trained = self.model
        self.model = self._load(self.dtype, random_weights=True)
        self.model.load_state_dict(trained.state_dict())
        try:
            return super()._generate()
        finally:
            self.model = trained

    def _reference(self) -> dict[str, Any]:
        pairs, size = self._pairs(self.case.requests, 0), self.case.recipe.train.micro_batch_size
        trainer = self._trainer(pairs, steps=1)
        self.model.eval()

        def score(_: int) -> None:
            for start in range(0, len(pairs), size):
                rows = [_record(pair) for pair in pairs[start : start + size]]
                batch = trainer.data_collator(rows)
                trainer.compute_ref_log_probs(self.model, {
                    name: tensor.to(hardware.device()) for name, tensor in batch.items()})

        seconds = median_seconds(score, self.case)
        return {"seconds": seconds, "tokens_per_second": tokens_of(pairs) / seconds}

    def _train(self) -> dict[str, Any]:
        case, size = self.case, self.case.recipe.train.global_batch_size
        steps = case.warmup + case.steps
        pairs = [pair for step in range(steps) for pair in by_length(self._pairs(size, step))]
        trainer, clock = self._trainer(pairs, steps=steps), _StepClock()
        trainer.add_callback(clock)
        trainer.train()
        seconds = statistics.median(clock.seconds[case.warmup :])
        return {"seconds": seconds,
                "tokens_per_second": tokens_of(self._pairs(size, 0)) / seconds}

    def _trainer(self, pairs: list[Pair], *, steps: int) -> "_Trainer":
        train = self.case.recipe.train
        pads = PreTrainedTokenizerFast(  # the trainer asks for one, and takes its padding
            tokenizer_object=Tokenizer(WordLevel({"end": 0}, unk_token="end")),
            pad_token="end", eos_token="end")
        options = DPOConfig(
            output_dir=tempfile.gettempdir(), max_steps=steps, beta=BETA, max_length=None,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.global_batch_size // train.micro_batch_size,
            learning_rate=learning_rate(self.case), lr_scheduler_type="constant",
            optim="adamw_torch_fused", bf16=self.dtype != torch.float32,
            precompute_ref_log_probs=True, gradient_checkpointing=False, disable_tqdm=True,
            logging_strategy="no", save_strategy="no", report_to="none",
            use_cpu=not hardware.IS_CUDA, dataloader_pin_memory=hardware.IS_CUDA,
        )
        return _Trainer(model=self.model, args=options, processing_class=pads,
                        train_dataset=Dataset.from_list([_record(pair) for pair in pairs]))


class _Trainer(DPOTrainer):
    """Over token ids and references that are there already, in order."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


class _StepClock(TrainerCallback):
    """Seconds from one optimizer step's end to the next one's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = self._now()
        self.seconds.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        hardware.synchronize()
        return time.perf_counter()


def _record(pair: Pair) -> dict[str, Any]:
    return {
        "prompt_ids": pair.prompt_ids.tolist(), "chosen_ids": pair.demo_ids.tolist(),
        "rejected_ids": pair.sample_ids.tolist(), "ref_chosen_logps": pair.ref_demo_logp,
        "ref_rejected_logps": pair.ref_sample_logp,
    }
