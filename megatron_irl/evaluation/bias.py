"""Stereotype pairs of the CrowS-Pairs kind: which of two sentences a model finds likelier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_irl.data.readers import RecordError, as_object, read_rows
from megatron_irl.errors import UserError
from megatron_irl.evaluation.measurements import Measurement, mean_of

MORE, LESS, KIND = "sent_more", "sent_less", "bias_type"


@dataclass(frozen=True)
class StereotypePair:
    """Two sentences that differ in the group they speak of; ``more`` is the stereotype."""

    more: str
    less: str
    kind: str


def load_stereotypes(path: Path) -> list[StereotypePair]:
    """Read records ``{"sent_more", "sent_less"}``, with ``bias_type`` if they have one.

    Raises:
        UserError: A file that is missing or empty; a record without one of the two sentences, or
            with equal ones, named by file and line.
    """
    pairs = []
    for place, raw in read_rows(path):
        try:
            record = as_object(raw)
        except RecordError as error:
            raise UserError(f"{place}: {error}") from error
        more, less = record.get(MORE), record.get(LESS)
        if not all(isinstance(text, str) and text.strip() for text in (more, less)):
            raise UserError(f"{place}: a stereotype pair needs the texts {MORE!r} (the stereotype) "
                            f"and {LESS!r}, as in CrowS-Pairs; found {sorted(record)}.")
        if more == less:
            raise UserError(f"{place}: {MORE!r} and {LESS!r} are the same sentence.")
        pairs.append(StereotypePair(str(more), str(less), str(record.get(KIND) or "")))
    if not pairs:
        raise UserError(f"{path}: the file has no records.")
    return pairs


def stereotype_rows(
    pairs: Sequence[StereotypePair], logps: Sequence[float]
) -> list[Measurement]:
    """Share of pairs whose stereotype is likelier (ties count half), of all and of each kind.

    Args:
        logps: [more_0, less_0, more_1, ...], of whole sentences in nats.
    """
    items = [float(a > b) + 0.5 * (a == b) for a, b in zip(logps[0::2], logps[1::2], strict=True)]
    metric = "stereotype likelier"
    rows = [mean_of("stereotypes", metric, "half", items, is_share=True)]
    kinds = sorted({pair.kind for pair in pairs} - {""})
    for kind in kinds if len(kinds) > 1 else ():
        of_kind = [item for item, pair in zip(items, pairs, strict=True) if pair.kind == kind]
        rows.append(mean_of(f"stereotypes/{kind}", metric, "half", of_kind, is_share=True))
    return rows
