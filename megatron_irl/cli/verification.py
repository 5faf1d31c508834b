"""Log-probabilities of the same tokens by transformers and by Megatron under several layouts."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_irl.cli.ranks import run_ranks
from megatron_irl.config import ParallelConfig
from megatron_irl.convert.hf_config import Architecture
from megatron_irl.convert.peft_folder import is_adapter, model_folder
from megatron_irl.data.tokenizer import load_tokenizer
from megatron_irl.errors import UserError

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Seven times eight is fifty-six; seven times nine is sixty-three.",
    "Once upon a time there was a small village at the edge of a large forest.",
)
RANDOM_SEQUENCES, RANDOM_TOKENS = 4, 96  # so that rare tokens and the vocabulary's end count too


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, written ``tp2pp2``."""

    tp: int
    pp: int

    @property
    def name(self) -> str:
        return f"tp{self.tp}pp{self.pp}"

    def parallel(self, arch: Architecture) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            sequence_parallel=self.tp > 1 and arch.dims["experts"] > 0,  # which experts need
        )

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read ``tp2pp1``.

        Raises:
            UserError: It does not look like that.
        """
        tp, _, pp = text.removeprefix("tp").partition("pp")
        if not (text.startswith("tp") and tp.isdecimal() and pp.isdecimal() and int(tp) * int(pp)):
            raise UserError(f"--layouts {text} is no layout; write tp2pp1, for example.")
        return cls(int(tp), int(pp))


def read_sequences(
    hf_dir: Path, prompts: Path | None, arch: Architecture, *, max_tokens: int
) -> list[list[int]]:
    """Token ids, every one but the first of which is scored.

    Without a file: a few sentences and random ids of the whole vocabulary.

    Raises:
        UserError: A line of the file is no prompt.
    """
    from megatron_irl.cli.encoding import prompt_ids
    from megatron_irl.data.conversation import Conversation
    from megatron_irl.data.prompts import PromptRecord, load_prompts

    tokenizer = load_tokenizer(model_folder(hf_dir))
    plain = [[{"role": "user", "content": text}] for text in TEXTS]
    records = load_prompts(str(prompts)) if prompts else [
        PromptRecord(Conversation(messages, "", plain=True), {}) for messages in plain]
    ids = [each.tolist() for each in prompt_ids(tokenizer, records)]
    if prompts is None:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, arch.vocab_size, (RANDOM_SEQUENCES, RANDOM_TOKENS))
        noise[0, -8:] = arch.vocab_size - 1 - np.arange(8) % arch.vocab_size
        ids += noise.tolist()
    longest = min(max_tokens, arch.max_sequence_length)
    ids = [sequence[:longest] for sequence in ids if len(sequence) > 1]
    if not ids:
        raise UserError(f"--prompts {prompts} holds no prompt of two tokens or more.")
    return ids


def transformers_logprobs(hf_dir: Path, sequences: Sequence[list[int]]) -> list[np.ndarray]:
    """Per sequence float32 [tokens - 1] by transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(hf_dir), dtype=torch.float32)
    if is_adapter(hf_dir):
        try:
            from peft import PeftModel
        except ImportError as error:
            raise UserError(f"{hf_dir} is an adapter, which transformers reads through peft. "
                            "Install peft.") from error
        model = PeftModel.from_pretrained(model, hf_dir)
    model.eval()
    scores = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        scores.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
    return scores


def megatron_logprobs(
    hf_dir: Path, checkpoint: Path | None, layout: Layout, sequences: Sequence[list[int]],
    program: Sequence[str],
) -> list[np.ndarray]:
    """The same by Megatron in fp32; starts the layout's ranks on this machine.

    Args:
        checkpoint: Where the weights are; None: in ``hf_dir``.
        program: How Python starts the command whose worker is ``score_as_rank``.

    Raises:
        UserError: The ranks failed; they have said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({
            "hf": str(hf_dir), "checkpoint": str(checkpoint) if checkpoint else None,
            "tp": layout.tp, "pp": layout.pp, "sequences": list(sequences),
        }))
        code = run_ranks(["--rank-job", str(job)], layout.tp * layout.pp, program)
        if code != 0:
            raise UserError(f"Megatron at {layout.name} ended with exit code {code}; see above.")
        scores = json.loads(job.with_suffix(".out").read_text())
    return [np.array(score, dtype=np.float32) for score in scores]


def score_as_rank(job_file: Path) -> None:
    """What a rank does: load, score, and on the first rank write. Collective over every rank."""
    from megatron_irl.convert.hf_config import architecture, read_hf_config
    from megatron_irl.convert.megatron_folder import load_megatron
    from megatron_irl.model.build import build_chunks, build_config
    from megatron_irl.parallel.topology import initialize, shutdown
    from megatron_irl.policy.policy import Policy

    job: dict[str, Any] = json.loads(job_file.read_text())
    hf_dir, layout = Path(job["hf"]), Layout(job["tp"], job["pp"])
    arch = architecture(read_hf_config(model_folder(hf_dir)))
    parallel = layout.parallel(arch)
    config = build_config(arch, parallel, precision="fp32")
    topology = initialize(parallel)
    policy = Policy(build_chunks(config, arch, topology), topology, arch)
    if job["checkpoint"] is None:
        policy.load_weights(hf_dir)
    else:
        load_megatron(policy.chunks, arch, Path(job["checkpoint"]), topology)
    ids = [np.array(sequence, dtype=np.int32) for sequence in job["sequences"]]
    scores = policy.score([(s[:1], s[1:]) for s in ids])
    if topology.is_main:
        job_file.with_suffix(".out").write_text(json.dumps([s.tolist() for s in scores]))
    shutdown()


def largest_difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Largest absolute difference in nats over all tokens."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
