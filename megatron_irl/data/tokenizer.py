"""One tokenizer for generation and training: text to ids, chat template included."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_irl.data.records import RecordError
from megatron_irl.data.sentencepiece_codec import SentencePieceCodec
from megatron_irl.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """Token ids of prompts and responses, from whatever library the model's tokenizer needs.

    A prompt and its response are tokenised apart and laid end to end, because that is what
    generation does: it continues the prompt's ids, whatever the joined text would have given.

    Attributes:
        vocab_size: One more than the largest id, added tokens included.
        eos_id: The token that ends a response: the one the chat template puts after an assistant
            turn when it is among ``stop_ids``, otherwise the tokenizer's own EOS.
        pad_id: Filler, never trained on; may equal ``eos_id``, so mask by length, not by id.
        bos_id: None where the tokenizer has none.
        stop_ids: Every id that ends a sample, ``eos_id`` first; ``generation_config.json`` may
            list more than one.
        chat_template: Jinja text, None where neither the model nor the recipe has one.
        adds_bos: Whether a plain string prompt is given a BOS.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None
    adds_bos: bool
    _encode: Callable[[str], list[int]]
    _encode_batch: Callable[[list[str]], list[list[int]]]
    _decode: Callable[[list[int]], str]
    _special_tokens: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; nothing is added, nothing is stripped."""
        return self._encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return ``encode`` of each text; the library does it faster together, on all cores."""
        return self._encode_batch(texts) if texts else []

    def decode(self, ids: Any) -> str:
        """Return the text of ``ids`` (any sequence of ints), special tokens left out."""
        return self._decode([int(i) for i in ids])

    def render_prompt(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Return the ids after which the model is to answer.

        Messages go through the chat template with the assistant's header appended. A string is
        taken as it is, with one BOS in front if the tokenizer adds one by default.

        Raises:
            UserError: Messages, but no chat template.
            RecordError: The chat template refuses these messages.
        """
        return self.prompt_ids(prompt, self.encode(self.prompt_text(prompt)))

    def prompt_text(self, prompt: str | list[dict[str, Any]]) -> str:
        """Return the text of a prompt whose ``encode`` is what ``prompt_ids`` wants."""
        if isinstance(prompt, str):
            return prompt
        return self.render_chat(prompt, add_generation_prompt=True)

    def prompt_ids(self, prompt: str | list[dict[str, Any]], ids: list[int]) -> list[int]:
        """Return ``render_prompt`` of a prompt whose text has been encoded to ``ids``."""
        if isinstance(prompt, str) and self.adds_bos and self.bos_id is not None:
            return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        return ids

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Return the text of ``messages`` under the chat template."""
        self.require_chat_template()
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RecordError(f"the chat template refuses the messages: {error}") from error
        return rendered[0]

    def require_chat_template(self) -> None:
        """Raise UserError if messages cannot be rendered."""
        if self.chat_template is None:
            raise UserError(
                "the data holds message lists, but the tokenizer has no chat template. Set "
                "data.chat_template to the path of a Jinja file or to the template's text."
            )

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of ``text`` with exactly one EOS, at the end.

        Raises:
            RecordError: The text spells out a stop token before its end; a sample would have
                ended there, so what follows could never be generated.
        """
        return self.ended(self.encode(text))

    def ended(self, ids: list[int]) -> list[int]:
        """Return ``response_ids`` of a text that has been encoded to ``ids``."""
        ids = list(ids)
        while ids and ids[-1] == self.eos_id:
            ids.pop()
        if not set(self.stop_ids).isdisjoint(ids):
            raise RecordError("the response holds an end-of-response token inside its text")
        return [*ids, self.eos_id]


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Load a tokenizer from local files; nothing is downloaded and no remote code is run.

    Args:
        path: A Hugging Face folder, or a SentencePiece ``.model`` file; a folder whose only
            tokenizer file is ``tokenizer.model`` is read with SentencePiece too.
        chat_template: Path to a Jinja file, or the template itself; replaces the model's own.

    Raises:
        UserError: Nothing loadable there, no such template, or no EOS token.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer={path} does not exist. Set it to a Hugging Face folder or "
                        "a SentencePiece .model file.")
    folder = path if path.is_dir() else path.parent
    if path.is_file() or _only_sentencepiece(path):
        fields, own_template = _load_sentencepiece(path, folder)
    else:
        fields, own_template = _load_hf(path)
    eos_ids = _generation_eos_ids(folder) if path.is_dir() else []
    own_eos = fields.pop("eos_id")
    if own_eos is not None:
        eos_ids = [own_eos, *eos_ids]
    if not eos_ids:
        raise UserError(f"tokenizer={path} has no EOS token, so no response could end. Set "
                        "eos_token in its tokenizer_config.json.")
    template = own_template if chat_template is None else _read_template(chat_template)
    tokenizer = Tokenizer(eos_id=eos_ids[0], stop_ids=tuple(dict.fromkeys(eos_ids)),
                          chat_template=template, **_with_pad(fields, eos_ids[0]))
    return _with_turn_end(tokenizer)


def _load_hf(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        hf = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False)
        template = None if hf.chat_template is None else hf.get_chat_template()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"tokenizer={path} cannot be loaded: {error}") from error
    bare, full = hf.encode("a", add_special_tokens=False), hf.encode("a")
    has_bos = hf.bos_token_id is not None
    return {
        "vocab_size": max(hf.get_vocab().values()) + 1,
        "eos_id": hf.eos_token_id,
        "pad_id": hf.pad_token_id,
        "bos_id": hf.bos_token_id,
        "adds_bos": has_bos and full[:1] == [hf.bos_token_id] and bare[:1] != full[:1],
        "_encode": lambda text: hf.encode(text, add_special_tokens=False),
        "_encode_batch": lambda texts: hf(
            texts, add_special_tokens=False, return_attention_mask=False,
            return_token_type_ids=False)["input_ids"],
        "_decode": lambda ids: hf.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "_special_tokens": dict(hf.special_tokens_map),
    }, template


def _load_sentencepiece(path: Path, folder: Path) -> tuple[dict[str, Any], str | None]:
    codec = SentencePieceCodec(path if path.is_file() else path / "tokenizer.model")
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if path.is_dir() and jinja.is_file() else None
    return {
        "vocab_size": codec.vocab_size,
        "eos_id": codec.eos_id,
        "pad_id": codec.pad_id,
        "bos_id": codec.bos_id,
        # The file does not say. Llama and Mistral, whose format this is, add a BOS.
        "adds_bos": codec.bos_id is not None,
        "_encode": codec.encode,
        "_encode_batch": codec.encode_batch,
        "_decode": codec.decode,
        "_special_tokens": codec.special_tokens,
    }, template


def _only_sentencepiece(path: Path) -> bool:
    others = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    has_other = any((path / name).exists() for name in others)
    return (path / "tokenizer.model").is_file() and not has_other


def _with_pad(fields: dict[str, Any], eos_id: int) -> dict[str, Any]:
    return fields | {"pad_id": eos_id if fields["pad_id"] is None else fields["pad_id"]}


def _generation_eos_ids(folder: Path) -> list[int]:
    """EOS ids the model's generation_config.json lists: one, several or none."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    try:
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if listed is None:
        return []
    return [int(i) for i in (listed if isinstance(listed, list) else [listed])]


def _with_turn_end(tokenizer: Tokenizer) -> Tokenizer:
    """Make ``eos_id`` the stop token that the chat template puts after an assistant turn.

    Where EOS and end of turn differ (Gemma's <eos> and <end_of_turn>), the model ends its samples
    with the latter; demonstrations ended with the former would be told apart by that token alone.
    """
    if tokenizer.chat_template is None or len(tokenizer.stop_ids) == 1:
        return tokenizer
    mark = "TURN"
    try:
        text = tokenizer.render_chat(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}],
            add_generation_prompt=False,
        )
    except RecordError:  # a template with demands of its own; keep the tokenizer's EOS
        return tokenizer
    after = tokenizer.encode(text.rpartition(mark)[2])
    end = next((i for i in after if i in tokenizer.stop_ids), tokenizer.eos_id)
    stop_ids = tuple(dict.fromkeys((end, *tokenizer.stop_ids)))
    return Tokenizer(**vars(tokenizer) | {"eos_id": end, "stop_ids": stop_ids})


def _read_template(template: str) -> str:
    if "{" in template or "\n" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise UserError(f"data.chat_template={template} is neither a file nor a Jinja template.")
    return path.read_text(encoding="utf-8")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if the tokenizer makes ids that the embedding does not have.

    Args:
        vocab_size: Rows of the model's embedding.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; token "
            "ids would fall outside the embedding. Set data.tokenizer to the model's own."
        )
