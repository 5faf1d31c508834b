"""Demonstrations as the model sees them, and how long they are, as lines of text."""

from collections.abc import Sequence

import numpy as np

from megatron_irl.data.codec import Codec
from megatron_irl.data.demonstrations import Limits, LoadReport
from megatron_irl.data.digest import digest_of
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.types import Demonstration

SHOWN_TOKENS = 160  # of a prompt or response, half of them from its end
BAR = 40  # characters of the longest bar of a histogram
NUM_BINS = 10
ROUND_TO = 64  # tokens; suggested limits are multiples of it


def show_records(
    demonstrations: Sequence[Demonstration], tokenizer: Tokenizer, count: int
) -> list[str]:
    """Return the first ``count`` demonstrations, prompt and response told apart.

    Special tokens are spelt out, line breaks escaped, and each counted token is in «marks».
    """
    lines = []
    for demonstration in demonstrations[:count]:
        prompt, response = demonstration.prompt_ids.tolist(), demonstration.response_ids.tolist()
        mask = demonstration.loss_mask
        counted = [True] * len(response) if mask is None else mask.tolist()
        lines += [
            f"{demonstration.source}: {len(prompt)} prompt tokens, {len(response)} response tokens,"
            f" {sum(counted)} counted",
            f"  prompt    {_shown(tokenizer.codec, [], prompt, [False] * len(prompt))}",
            f"  response  {_shown(tokenizer.codec, prompt, response, counted)}",
        ]
        if demonstration.answer is not None:
            lines.append(f"  answer    {demonstration.answer!r}")
    return lines


def describe_lengths(
    report: LoadReport, limits: Limits, demonstrations: Sequence[Demonstration],
    max_sequence_length: int,
) -> list[str]:
    """Return histograms of lengths, what is left out by which limit, and limits that would fit.

    Args:
        report: Of the loading; its lengths are those of everything, left out or not.
        limits: That were in force.
        demonstrations: Those kept.
        max_sequence_length: Positions of the model.
    """
    lengths = {"prompt": np.array(report.prompt_lengths), "response":
               np.array(report.response_lengths)}
    kept = {"prompt": limits.max_prompt_length, "response": limits.max_response_length}
    lines = []
    for name, values in lengths.items():
        lines += _histogram(f"{name} tokens", values, kept[name])
    over = {name: int((values > kept[name]).sum()) for name, values in lengths.items()}
    total = len(report.prompt_lengths)
    lines.append(
        f"of {total}: {over['prompt']} over data.max_prompt_length={limits.max_prompt_length}, "
        f"{over['response']} over data.max_response_length={limits.max_response_length}; "
        f"data.overlong={limits.overlong} drops {report.dropped_prompt} by the prompt and "
        f"{report.dropped_response} by the response, and cuts {report.truncated_prompts} prompts")
    copies = count_duplicates(demonstrations)
    lines.append(f"{copies} of the {report.kept} kept are copies of an earlier one, prompt and "
                 "response alike")
    return [*lines, *_suggestion(lengths, max_sequence_length)]


def count_duplicates(demonstrations: Sequence[Demonstration]) -> int:
    """How many demonstrations have the ids of an earlier one."""
    digests = {digest_of([(d.prompt_ids, d.response_ids)]) for d in demonstrations}
    return len(demonstrations) - len(digests)


def _suggestion(lengths: dict[str, np.ndarray], max_sequence_length: int) -> list[str]:
    """Limits that keep everything, or as good as everything, within the model's positions."""
    lines = []
    for share in (100.0, 99.0, 95.0):
        prompt, response = (
            -(-int(np.percentile(values, share, method="higher")) // ROUND_TO) * ROUND_TO
            for values in lengths.values()
        )
        fits = prompt + response <= max_sequence_length
        rest = "" if fits else f" (more than the model's {max_sequence_length} positions)"
        keeps = float(np.mean((lengths["prompt"] <= prompt) & (lengths["response"] <= response)))
        lines.append(f"data.max_prompt_length={prompt} data.max_response_length={response} would "
                     f"keep {keeps:.2%}{rest}")
        if fits:
            break
    return lines


def _histogram(name: str, values: np.ndarray, limit: int) -> list[str]:
    """A line of quantiles, and a bar for each of a few equally wide ranges of lengths."""
    quantiles = ", ".join(f"{q}% {int(np.percentile(values, q, method='higher'))}"
                          for q in (50, 90, 99))
    lines = [f"{name}: shortest {values.min()}, {quantiles}, longest {values.max()}; limit {limit}"]
    width = -(-int(values.max() + 1) // NUM_BINS)
    counts = np.bincount(values // width, minlength=1)
    for index, count in enumerate(counts):
        bar = "#" * -(-BAR * int(count) // int(counts.max()))
        lines.append(f"  {index * width:>6} to {(index + 1) * width - 1:<6} {count:>8} {bar}")
    return lines


def _shown(codec: Codec, before: list[int], ids: list[int], counted: Sequence[bool]) -> str:
    """The pieces of ``ids``, the counted ones in marks, those in the middle of many left out."""
    pieces = piece_texts(codec, before, ids)
    marked = [f"«{piece}»" if is_counted else piece
              for piece, is_counted in zip(pieces, counted, strict=True)]
    if len(marked) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        left_out = f" ... {len(marked) - 2 * half} tokens ... "
        marked = [*marked[:half], left_out, *marked[-half:]]
    return "".join(marked)


def piece_texts(codec: Codec, before: list[int], ids: list[int]) -> list[str]:
    """The text of each id where it stands, special tokens spelt out and line breaks escaped.

    Ids that are a part of a character are shown by number.
    """
    pieces = []
    everything = before[-4:] + ids
    for position in range(len(everything) - len(ids), len(everything)):
        context = everything[max(position - 4, 0) : position]
        head = codec.decode_all(context) if context else ""
        text = codec.decode_all([*context, everything[position]])
        piece = text[len(head) :] if text.startswith(head) else codec.decode_all(
            [everything[position]])
        shown = piece.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        is_part = "\ufffd" in piece or not piece
        pieces.append(f"<#{everything[position]}>" if is_part else shown)
    return pieces
