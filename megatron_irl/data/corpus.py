"""What the user gave to learn from and to judge by, read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from megatron_irl.config import DataSource, Recipe
from megatron_irl.data.demonstrations import LoadReport, read_demonstrations
from megatron_irl.data.digest import digest_of
from megatron_irl.data.preferences import Preference, load_preferences
from megatron_irl.data.sources import Reading, evaluation_reading, training_reading
from megatron_irl.data.token_table import ids_of, masks_of
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.types import Demonstration

Fill = Callable[[Callable[[Demonstration], object]], LoadReport]
"""Given what takes a demonstration, gives it all there are."""
Gather = Callable[[str, Fill], tuple[Sequence[Demonstration], LoadReport]]
"""(``train`` or ``eval``, what fills it) -> the demonstrations, wherever they are kept."""


@dataclass(frozen=True)
class Corpus:
    """Token ids of everything a run reads; the sequences may be mapped files, see ``token_table``.

    Attributes:
        demonstrations: Of ``data.train``.
        heldout: Of ``data.eval``.
        preferences: Those the algorithm trains on; empty for most.
        heldout_preferences: Of ``data.eval_preferences``.
        digest: Of what is trained on. Order and ordinals of records are a run's coordinates.
        notes: Lines for the user: how many were kept, dropped, cut.
        report: What became of the records of ``data.train``.
    """

    demonstrations: Sequence[Demonstration]
    heldout: Sequence[Demonstration] = ()
    preferences: Sequence[Preference] = ()
    heldout_preferences: Sequence[Preference] = ()
    digest: str = ""
    notes: tuple[str, ...] = ()
    report: LoadReport = field(default_factory=LoadReport)


def read_corpus(
    recipe: Recipe, tokenizer: Tokenizer, *,
    preferences: tuple[str, Sequence[str | DataSource]] | None = None,
    gather: Gather | None = None,
) -> Corpus:
    """Read and encode every file of a recipe.

    Args:
        preferences: Dotted key and files of the preferences that are trained on.
        gather: Where demonstrations are kept; None: in lists.

    Raises:
        UserError: A record or file is wrong; held-out or training preferences without any.
    """
    limits = {
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_response_length": recipe.data.max_response_length,
        "overlong": recipe.data.overlong,
    }
    turns = recipe.data.turns
    notes = list(tokenizer.notes)
    gather = gather or _in_lists
    training = training_reading(recipe.data, notes)
    demonstrations, report = gather("train", lambda keep: read_demonstrations(
        training, tokenizer, keep, turns=turns, **limits
    ))
    notes.append(f"data.train: {report.summary()}")
    heldout: Sequence[Demonstration] = ()
    held_out = evaluation_reading(recipe.data, notes)
    if held_out is not None:
        heldout, eval_report = gather("eval", lambda keep: read_demonstrations(
            # One sequence of all turns cannot be generated for; each turn alone has the same
            # tokens to be likely.
            held_out, tokenizer, keep, turns="each" if turns == "all" else turns,
            limit=recipe.data.eval_limit, **limits,
        ))
        notes.append(f"data.eval: {eval_report.summary()}")
    trained_on = _read_preferences(*preferences, recipe, tokenizer, notes) if preferences else []
    heldout_preferences = _read_preferences(
        "data.eval_preferences", recipe.data.eval_preferences, recipe, tokenizer, notes
    )
    digest = digest_of(chain(
        ids_of(demonstrations),
        ((p.prompt_ids, ids) for p in trained_on for ids in (p.chosen_ids, p.rejected_ids)),
    ), masks_of(demonstrations))
    return Corpus(
        demonstrations, heldout, trained_on, heldout_preferences, digest, tuple(notes), report
    )


def _in_lists(name: str, fill: Fill) -> tuple[Sequence[Demonstration], LoadReport]:
    del name
    kept: list[Demonstration] = []
    return kept, fill(kept.append)


def _read_preferences(
    key: str, sources: Sequence[str | DataSource], recipe: Recipe, tokenizer: Tokenizer,
    notes: list[str],
) -> Sequence[Preference]:
    if not sources:
        return []
    reading = Reading(tuple(sources), bad_records=recipe.data.bad_records, notes=notes)
    preferences = load_preferences(
        reading, tokenizer, max_prompt_length=recipe.data.max_prompt_length,
        max_response_length=recipe.data.max_response_length, overlong=recipe.data.overlong,
    )
    if not preferences:
        raise UserError(f"{key}={reading} has no usable preference. Set {key} to files "
                        "that have some, or raise data.max_prompt_length and "
                        "data.max_response_length.")
    notes.append(f"{key}: {preferences.summary()}")
    return preferences
