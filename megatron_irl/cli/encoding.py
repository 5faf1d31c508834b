"""Records of ``generate`` and ``score`` as token ids, through the door that training uses."""

from collections.abc import Sequence

import numpy as np

from megatron_irl.data.prompts import PromptRecord, ScoreRecord
from megatron_irl.data.readers import RecordError
from megatron_irl.data.rendering import encode_conversations, encode_prompt
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError


def prompt_ids(tokenizer: Tokenizer, records: Sequence[PromptRecord]) -> list[np.ndarray]:
    """Return int32 ids of each prompt, none empty.

    Raises:
        UserError: The chat template refuses a record, named by file and line, or it has no tokens.
    """
    prompts = []
    for record in records:
        try:
            ids = encode_prompt(tokenizer, record.conversation)
        except RecordError as error:
            raise UserError(f"{record.source}: {error}") from error
        if not ids:
            raise UserError(f"{record.source}: the prompt has no tokens.")
        prompts.append(np.asarray(ids, dtype=np.int32))
    return prompts


def scored_sequences(
    tokenizer: Tokenizer, records: Sequence[ScoreRecord], *, max_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (prompt, response) int32 ids of every response of every record, in order.

    Raises:
        UserError: As ``prompt_ids``; prompt and response are longer than the model's positions.
    """
    sequences = []
    for record in records:
        encoded = encode_conversations(tokenizer, record.conversations, allow_empty=True)
        for each in encoded:
            if isinstance(each, RecordError):
                raise UserError(f"{record.source}: {each}")
            if len(each.ids) > max_length:
                raise UserError(
                    f"{record.source}: prompt and response have {len(each.ids)} tokens, more than "
                    f"the model's {max_length} positions. Shorten them."
                )
            sequences.append((np.array(each.prompt_ids, np.int32),
                              np.array(each.response_ids, np.int32)))
    return sequences
