"""One tokenizer for generation and training: codec, chat template, and where answers end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_irl.data.chat_template import ChatTemplate
from megatron_irl.data.codec import Codec, load_codec, read_text, text_after
from megatron_irl.data.readers import RecordError
from megatron_irl.data.template_check import TurnShape, learn_shape
from megatron_irl.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """What turns conversations into ids, once (``data.rendering`` does), and ids into text.

    Attributes:
        codec: Text to ids and back.
        eos_id: The token that ends a response: the one the chat template puts after an assistant
            turn, otherwise the tokenizer's own EOS.
        pad_id: Filler, never trained on; may equal ``eos_id``, so mask by length, not by id.
        stop_ids: Every id that ends a sample, ``eos_id`` first: the template's, the tokenizer's,
            and those of ``generation_config.json`` and ``config.json``.
        template: None where neither the model nor the recipe has one.
        shape: What the template does around an assistant's turn.
        embedding_rows: Rows of the model's embedding where the tokenizer knows more ids than it
            has, see ``fitted``; a text that needs one of those cannot be used.
    """

    codec: Codec
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    template: ChatTemplate | None = None
    shape: TurnShape = field(default_factory=TurnShape)
    embedding_rows: int | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self.codec.vocab_size

    @property
    def bos_id(self) -> int | None:
        """None where the tokenizer has none."""
        return self.codec.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether a plain string prompt is given a BOS."""
        return self.codec.adds_bos

    @property
    def chat_template(self) -> str | None:
        """The template's text."""
        return None if self.template is None else self.template.text

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about tokenizer and chat template, each a sentence."""
        if self.embedding_rows is None:
            return self.shape.notes
        return (*self.shape.notes, (
            f"warning: the tokenizer has {self.vocab_size} tokens, the model's embedding "
            f"{self.embedding_rows} rows; a text with a token beyond them is refused"))

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RecordError if the embedding does not have all of a text's ids."""
        if self.embedding_rows is None:
            return
        token = max(ids, default=0)
        if token >= self.embedding_rows:
            raise RecordError(
                f"the token {self.codec.decode_all([token])!r} has the id {token}, the model's "
                f"embedding {self.embedding_rows} rows. Write the text without it, or enlarge the "
                "embedding")

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; nothing is added, nothing is stripped."""
        return self.codec.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return ``encode`` of each text; the library does it faster together, on all cores."""
        return self.codec.encode_batch(texts) if texts else []

    def decode(self, ids: Any) -> str:
        """Return the text of ``ids`` (any sequence of ints), special tokens left out."""
        return self.codec.decode([int(i) for i in ids])

    def response_text(self, prompt_ids: Any, ids: Any, *, plain: bool) -> str:
        """Return the text of a response, such that rendering it again gives the same ids.

        Its first space is kept, which decoding it by itself would lose; what the template writes
        around every answer is no part of it.

        Args:
            prompt_ids: What the response follows, and
            ids: the response's: sequences of ints.
            plain: The prompt did not go through the chat template.
        """
        text = text_after(self.codec, [int(i) for i in prompt_ids], [int(i) for i in ids])
        if plain:
            return text
        return text.removeprefix(self.shape.shown_lead).removesuffix(self.shape.shown_tail)

    def require_chat_template(self) -> ChatTemplate:
        """Return the chat template; UserError if there is none."""
        if self.template is None:
            raise UserError(
                "the data holds message lists, but the tokenizer has no chat template. Set "
                "data.chat_template to the path of a Jinja file or to the template's text."
            )
        return self.template


def load_tokenizer(
    path: str | Path,
    chat_template: str | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    date: datetime | None = None,
    model: str | Path | None = None,
) -> Tokenizer:
    """Load a tokenizer from local files; nothing is downloaded and no remote code is run.

    Args:
        path: A Hugging Face folder, or a SentencePiece ``.model`` file; a folder whose only
            tokenizer file is ``tokenizer.model`` is read with SentencePiece too.
        chat_template: Path to a Jinja file, or the template itself; replaces the model's own.
        arguments: Further variables of the template (``data.chat_template_args``).
        date: What the template takes for the present; None: now.
        model: The model's folder, if the tokenizer is kept elsewhere: its configuration may list
            further ids that end a response.

    Raises:
        UserError: Nothing loadable there, no such template, one that cannot be learnt from, or no
            EOS token.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer={path} does not exist. Set it to a Hugging Face folder or "
                        "a SentencePiece .model file.")
    codec, own_template = load_codec(path)
    folders = dict.fromkeys(Path(p) for p in (path, model) if p is not None and Path(p).is_dir())
    listed = [i for folder in folders for i in listed_eos_ids(folder)]
    own = [] if codec.eos_id is None else [codec.eos_id]
    stop_ids = list(dict.fromkeys([*own, *listed]))
    text = own_template if chat_template is None else _read_template(chat_template)
    template, shape = None, TurnShape()
    if text is not None:
        template = ChatTemplate(text, codec.special_tokens, arguments or {}, date or datetime.now())
        own = chat_template is None
        template.check(f"tokenizer={path}" if own else f"data.chat_template={chat_template}"[:200])
        try:
            shape = learn_shape(template, codec, stop_ids)
        except RecordError as error:
            raise UserError(f"tokenizer={path}: {error}.") from error
    if shape.end_id is not None:
        stop_ids = list(dict.fromkeys([shape.end_id, *stop_ids]))
    if not stop_ids:
        raise UserError(f"tokenizer={path} has no EOS token, so no response could end. Set "
                        "eos_token in its tokenizer_config.json.")
    pad_id = stop_ids[0] if codec.pad_id is None else codec.pad_id
    return Tokenizer(codec, stop_ids[0], pad_id, tuple(stop_ids), template, shape)


def listed_eos_ids(folder: Path) -> list[int]:
    """EOS ids that a model's files list, each once: transformers stops at those of the first file.

    Raises:
        UserError: A file cannot be read, or lists something else than ids.
    """
    listed: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            config = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{file} cannot be read: it is no JSON object.")
        text_config = config.get("text_config")
        nested = text_config if isinstance(text_config, dict) else {}
        value = config.get("eos_token_id", nested.get("eos_token_id"))
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise UserError(f"{file}: eos_token_id={value!r} must be a token id or a list of "
                                "them. Write the number that tokenizer.json gives the token.")
            listed.append(item)
    return list(dict.fromkeys(listed))


def _read_template(template: str) -> str:
    if "{" in template or "\n" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise UserError(f"data.chat_template={template} is neither a file nor a Jinja template.")
    return read_text(path)


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return the tokenizer for a model with so many rows in its embedding.

    Public models have added tokens that no text of theirs uses and no row stands for, a ``[PAD]``
    say. Such a padding token is the end of turn instead, and such an end of turn is never sampled.
    The rows that the embedding is padded with for tensor parallelism are not trained: they count
    as none.

    Args:
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: The token that ends a response has no row, so no response could be learnt.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    end = tokenizer.eos_id
    if end >= vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; the token "
            f"{tokenizer.codec.decode_all([end])!r} (id {end}), which ends a response, would fall "
            "outside the embedding. Set data.tokenizer to the model's own, or data.chat_template "
            "to one that ends turns with a token it has."
        )
    return replace(
        tokenizer, embedding_rows=vocab_size,
        pad_id=tokenizer.pad_id if tokenizer.pad_id < vocab_size else end,
        stop_ids=tuple(i for i in tokenizer.stop_ids if i < vocab_size))
