"""What studies start from: a small Llama over letters, made from nothing, or a pretrained one."""

from pathlib import Path

from megatron_irl.errors import UserError
from studies.tasks import LETTERS


def make_model(folder: Path, *, hidden: int, layers: int, seed: int = 0) -> None:
    """Write random weights and a tokenizer whose tokens are letters, as an HF folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return
    tokens = ["<eos>", "<bos>", *LETTERS, "="]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def pretrained(hf: str) -> Path:
    """The folder of a pretrained model, which must be there."""
    folder = Path(hf).resolve()
    if not (folder / "config.json").exists():
        raise UserError(f"model.hf {hf}: there is no model, seen from {Path.cwd()}. "
                        f"SmolLM2 is made with: python tools/make_smollm2.py --out {hf}")
    return folder
