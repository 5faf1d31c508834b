"""A SentencePiece model file read without a Hugging Face folder around it."""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_irl.errors import UserError


class SentencePieceCodec:
    """Text to ids and back, with control pieces such as ``</s>`` recognised in the text.

    SentencePiece itself never parses control pieces, but a chat template writes them as text. The
    text between two of them is encoded on its own, so with the usual "dummy prefix" a space is
    put before each such stretch, as Llama's original tokenizer did.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if ``path`` is not a SentencePiece model."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer={path} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id = self._optional(self._model.bos_id())
        self.eos_id = self._optional(self._model.eos_id())
        self.pad_id = self._optional(self._model.pad_id())
        self._control = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size) if self._model.is_control(i)
        }  # fmt: skip
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` by name, for chat templates."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {k: self._model.id_to_piece(i) for k, i in ids.items() if i is not None}

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control pieces."""
        return frozenset(self._control.values())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded on all cores."""
        split = [self._split.split(text) if self._control else [text] for text in texts]
        plain = [p for parts in split for p in parts if p and p not in self._control]
        encoded = iter(self._model.encode(plain, out_type=int))
        return [
            [i for part in parts if part for i in self._control_ids(part) or next(encoded)]
            for parts in split
        ]

    def _control_ids(self, part: str) -> list[int]:
        return [self._control[part]] if part in self._control else []

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, control pieces left out."""
        return self._model.decode([i for i in ids if not self._model.is_control(i)])

    def decode_all(self, ids: list[int]) -> str:
        """Return the text of ``ids``, control pieces spelt out."""
        text, stretch = "", []
        for i in [*ids, -1]:
            if i < 0 or self._model.is_control(i):
                text += self._model.decode(stretch) if stretch else ""
                text += self._model.id_to_piece(i) if i >= 0 else ""
                stretch = []
            else:
                stretch.append(i)
        return text

    @staticmethod
    def _optional(token_id: int) -> int | None:
        return token_id if token_id >= 0 else None
