"""Text to token ids and back, from whatever library a model's tokenizer needs; no templates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from megatron_irl.data.readers import RecordError
from megatron_irl.data.sentencepiece_codec import SentencePieceCodec
from megatron_irl.errors import UserError

CONTEXT = 16  # ids that are decoded before others, to keep the space in between
CHECKED = 64  # texts whose split by offsets is compared with an encoding of the prefix


class Split(NamedTuple):
    """The ids of a text, and how many of them come before some positions in it.

    Attributes:
        ids: Of the whole text.
        counts: For each position, the length of the longest common prefix of ``ids`` and the ids of
            the text before that position.
        missing: For each position, how many ids of the text before it are not in that prefix: 0
            where a token begins exactly there.
    """

    ids: list[int]
    counts: list[int]
    missing: list[int]


@dataclass(frozen=True)
class Codec:
    """Token ids of text; nothing is added, nothing is stripped.

    Attributes:
        vocab_size: One more than the largest id, added tokens included.
        eos_id, pad_id, bos_id: None where the tokenizer has none.
        adds_bos: Whether a text that is not a rendered chat is given a BOS.
        special_tokens: By the names that chat templates use.
        special_ids: Ids of tokens that are no text, such as marks of a turn's end.
        encode_batch: Texts to ids, all together: the library uses every core.
        split_batch: (text, positions in it) to ``Split``, all together.
            Both raise RecordError if the library fails on one of the texts.
        decode: Ids to text, special tokens left out.
        decode_all: Ids to text, special tokens spelt out.
    """

    vocab_size: int
    eos_id: int | None
    pad_id: int | None
    bos_id: int | None
    adds_bos: bool
    special_tokens: dict[str, Any]
    special_ids: frozenset[int]
    encode_batch: Callable[[list[str]], list[list[int]]]
    split_batch: Callable[[Sequence[tuple[str, Sequence[int]]]], list[Split]]
    decode: Callable[[list[int]], str]
    decode_all: Callable[[list[int]], str]


def load_codec(path: Path) -> tuple[Codec, str | None]:
    """Return the codec of a tokenizer's files, and the chat template among them if there is one.

    Args:
        path: A Hugging Face folder, or a SentencePiece ``.model`` file; a folder whose only
            tokenizer file is ``tokenizer.model`` is read with SentencePiece too.

    Raises:
        UserError: Nothing loadable there. No remote code is run, nothing is downloaded.
    """
    is_sentencepiece = path.is_file() or _only_sentencepiece(path)
    codec, template = (_load_sentencepiece if is_sentencepiece else _load_hf)(path)
    return replace(codec, encode_batch=_guarded(codec.encode_batch),
                   split_batch=_guarded(codec.split_batch)), template


def _guarded[T, R](work: Callable[[T], R]) -> Callable[[T], R]:
    """``work``, whatever it raises turned into RecordError: it is about the texts or the files."""
    def guarded(texts: T) -> R:
        try:
            return work(texts)
        except BaseException as error:
            # A panic of the Rust library is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise RecordError(f"the tokenizer fails on the text: {error}. Look at its "
                              "tokenizer.json") from error

    return guarded


def split_each(
    codec: Codec, texts: Sequence[tuple[str, Sequence[int]]]
) -> list[Split | RecordError]:
    """``Codec.split_batch``, with the error of each text that the library fails on in its place."""
    if not texts:
        return []
    try:
        return list(codec.split_batch(texts))
    except RecordError as error:
        if len(texts) == 1:
            return [error]
    return [found for text in texts for found in split_each(codec, [text])]


def text_after(codec: Codec, before: list[int], ids: list[int]) -> str:
    """Return the text of ``ids`` as it stands behind ``before``, special tokens left out.

    Decoded by themselves, the ids of a SentencePiece kind of tokenizer lose their first space.
    """
    context = before[-CONTEXT:]
    if not codec.decode(context):  # only special tokens, which show no space
        context = before
    head, text = codec.decode(context), codec.decode(context + ids)
    return text[len(head) :] if text.startswith(head) else codec.decode(ids)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def split_by_encoding(
    encode_batch: Callable[[list[str]], list[list[int]]],
    texts: Sequence[tuple[str, Sequence[int]]],
) -> list[Split]:
    """``Codec.split_batch`` for any encoder, by encoding the text before each position as well."""
    flat = [part for text, positions in texts
            for part in (text, *(text[:position] for position in positions))]
    encoded = iter(encode_batch(flat))
    splits = []
    for _, positions in texts:
        ids = next(encoded)
        prefixes = [next(encoded) for _ in positions]
        counts = [common_prefix(ids, prefix) for prefix in prefixes]
        missing = [len(p) - count for p, count in zip(prefixes, counts, strict=True)]
        splits.append(Split(ids, counts, missing))
    return splits


class _FastSplitter:
    """``Codec.split_batch`` from the characters that each token covers: one encoding per text.

    Where a token begins at the position, the ids before it are those of the text before it: no
    merge went across, and merges within a part do not depend on the other. That is so of BPE,
    Unigram and WordPiece with the usual normalizers; the first texts are encoded both ways, and a
    tokenizer for which it is not so is split by encoding from then on.
    """

    def __init__(self, backend: Any) -> None:
        # Post-processors add special tokens, which nobody asks for here, and byte-level ones take
        # leading spaces out of the offsets.
        backend.post_processor = None
        self._backend = backend
        self._to_check = CHECKED
        self._is_reliable = True

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]

    def split_batch(self, texts: Sequence[tuple[str, Sequence[int]]]) -> list[Split]:
        if not self._is_reliable:
            return split_by_encoding(self.encode_batch, texts)
        encodings = self._backend.encode_batch([t for t, _ in texts], add_special_tokens=False)
        splits = [self._split(encoding, text, positions)
                  for encoding, (text, positions) in zip(encodings, texts, strict=True)]
        if self._to_check > 0:
            checked = texts[: self._to_check]
            self._to_check -= len(checked)
            expected = split_by_encoding(self.encode_batch, checked)
            if splits[: len(checked)] != expected:
                self._is_reliable = False
                return split_by_encoding(self.encode_batch, texts)
        return splits

    def _split(self, encoding: Any, text: str, positions: Sequence[int]) -> Split:
        ids = encoding.ids
        counts, missing = [], []
        for position in positions:
            count = len(ids) if position == len(text) else _boundary(encoding, position)
            lost = 0
            if count is None:
                prefix = self.encode_batch([text[:position]])[0]
                count = common_prefix(ids, prefix)
                lost = len(prefix) - count
            counts.append(count)
            missing.append(lost)
        return Split(ids, counts, missing)


def _boundary(encoding: Any, position: int) -> int | None:
    """Tokens before the character at ``position``, if one begins there and none reaches over."""
    token = encoding.char_to_token(position)
    if token is None or encoding.token_to_chars(token)[0] < position:
        return None
    if token > 0 and (encoding.token_to_chars(token - 1) or (0, 0))[1] > position:
        return None
    return token


def _load_hf(path: Path) -> tuple[Codec, str | None]:
    # Any exception: the loader runs over several files of the user's and fails in as many ways
    # (KeyError, TypeError, the Rust library's bare Exception...); all of them are about the files.
    try:
        hf = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False)
        template = None if hf.chat_template is None else hf.get_chat_template()
        bare, full = hf.encode("a", add_special_tokens=False), hf.encode("a")
        vocab_size = max(hf.get_vocab().values()) + 1
    except Exception as error:  # a tokenizer's files can make their library stumble over anything
        raise UserError(f"tokenizer={path} cannot be loaded: {_reason(error)}. Look at its "
                        "tokenizer.json and tokenizer_config.json.") from error
    backend = getattr(hf, "backend_tokenizer", None) if hf.is_fast else None
    if backend is None:
        def encode_batch(texts: list[str]) -> list[list[int]]:
            return hf(texts, add_special_tokens=False, return_attention_mask=False,
                      return_token_type_ids=False)["input_ids"] if texts else []

        def split_batch(texts: Sequence[tuple[str, Sequence[int]]]) -> list[Split]:
            return split_by_encoding(encode_batch, texts)
    else:
        splitter = _FastSplitter(backend)
        encode_batch, split_batch = splitter.encode_batch, splitter.split_batch
    has_bos = hf.bos_token_id is not None
    added = {i for i, token in hf.added_tokens_decoder.items() if token.special}
    return Codec(
        vocab_size=vocab_size, eos_id=hf.eos_token_id, pad_id=hf.pad_token_id,
        bos_id=hf.bos_token_id,
        adds_bos=has_bos and full[:1] == [hf.bos_token_id] and bare[:1] != full[:1],
        special_tokens=dict(hf.special_tokens_map),
        special_ids=frozenset(added | set(hf.all_special_ids)),
        encode_batch=encode_batch, split_batch=split_batch,
        decode=lambda ids: hf.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        decode_all=lambda ids: hf.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    ), template


def _load_sentencepiece(path: Path) -> tuple[Codec, str | None]:
    codec = SentencePieceCodec(path if path.is_file() else path / "tokenizer.model")
    template = None
    if path.is_dir() and (path / "chat_template.jinja").is_file():
        template = read_text(path / "chat_template.jinja")
    return Codec(
        vocab_size=codec.vocab_size, eos_id=codec.eos_id, pad_id=codec.pad_id,
        bos_id=codec.bos_id,
        # The file does not say. Llama and Mistral, whose format this is, add a BOS.
        adds_bos=codec.bos_id is not None,
        special_tokens=dict(codec.special_tokens), special_ids=codec.control_ids,
        encode_batch=codec.encode_batch,
        split_batch=lambda texts: split_by_encoding(codec.encode_batch, texts),
        decode=codec.decode, decode_all=codec.decode_all,
    ), template


def read_text(path: Path) -> str:
    """The text of a file; UserError if there is none in it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, OSError | ValueError) and text else (
        f"{type(error).__name__}: {text}")


def _only_sentencepiece(path: Path) -> bool:
    others = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    has_other = any((path / name).exists() for name in others)
    return (path / "tokenizer.model").is_file() and not has_other
