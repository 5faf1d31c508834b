"""The sigmoid pair loss is DPO's with samples as the rejected side: checked against TRL itself.

A real ``trl.DPOTrainer`` on a tiny random Llama against plain transformers logits and our loss:
same pairs, same reference, every parameter's gradient.
"""

from pathlib import Path

import pytest
import torch

from megatron_irl.objectives import irft_loss, sequence_logprobs

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

VOCAB = 32
BETA = 0.3
EOS = 0
# (prompt, demonstration, sample) of different lengths; EOS ends every response.
PAIRS = [([5, 6, 7], [8, 9, 10, 11, EOS], [12, 13, EOS]),
         ([14, 15], [16, EOS], [17, 18, 19, 20, 21, 22, EOS]),
         ([23, 24, 25, 26], [27, 28, 29, EOS], [27, 30, 31, EOS])]


def tiny_llama(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=1, initializer_range=0.5)
    return transformers.LlamaForCausalLM(config)


def word_tokenizer():
    """One word per id, so that text and ids say the same."""
    vocab = {"<eos>": EOS, "<pad>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def words(ids: list[int]) -> str:
    return "".join(" <eos>" if i == EOS else f" w{i}" for i in ids)


def response_logps(model: torch.nn.Module) -> torch.Tensor:
    """[S] summed response log-probabilities in our order, one unpadded sequence at a time."""
    rows, segments = [], []
    sequences = [(p, r) for p, demo, sample in PAIRS for r in (demo, sample)]
    for index, (prompt, response) in enumerate(sequences):
        ids = torch.tensor([prompt + response])
        logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        row_ids = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        rows.append(logprobs[row_ids, ids[0, len(prompt):]])
        segments += [index] * len(response)
    return sequence_logprobs(torch.cat(rows), torch.tensor(segments), len(sequences))


@pytest.mark.filterwarnings("ignore")
def test_gradient_of_every_parameter_equals_trls(tmp_path: Path):
    policy, reference = tiny_llama(0), tiny_llama(1)
    dataset = datasets.Dataset.from_list([
        {"prompt": words(p), "chosen": words(y), "rejected": words(z)} for p, y, z in PAIRS])
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, train_dataset=dataset,
        processing_class=word_tokenizer(),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=BETA, loss_type="sigmoid", use_cpu=True, bf16=False,
            per_device_train_batch_size=len(PAIRS), report_to="none", max_length=None,
            disable_dropout=True, gradient_checkpointing=False, dataloader_num_workers=0))
    examples = [trainer.train_dataset[i] for i in range(len(PAIRS))]
    assert [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples] == PAIRS
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    their_loss.backward()
    names, parameters = zip(*policy.named_parameters(), strict=True)
    theirs = [p.grad.clone() for p in parameters]

    with torch.no_grad():
        ref_logps = response_logps(reference)
    lengths = torch.tensor([len(r) for _, y, z in PAIRS for r in (y, z)])
    out = irft_loss(response_logps(policy), ref_logps, lengths, beta=BETA)
    loss = out.total / out.weight
    ours = torch.autograd.grad(loss, parameters)

    assert out.metrics["reward/abs_margin_max"].total > 1  # far from the trivial ln 2
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    for name, mine, its in zip(names, ours, theirs, strict=True):
        error = (mine - its).norm() / its.norm()
        assert error < 1e-5, f"{name}: relative gradient error {error:.2e}"
