"""What the user gave to learn from and to judge by, read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_irl.config import Recipe
from megatron_irl.data.demonstrations import load_demonstrations
from megatron_irl.data.digest import digest_of
from megatron_irl.data.preferences import Preference, load_preferences
from megatron_irl.data.tokenizer import Tokenizer
from megatron_irl.errors import UserError
from megatron_irl.types import Demonstration


@dataclass(frozen=True)
class Corpus:
    """Token ids of everything a run reads.

    Attributes:
        demonstrations: Of ``data.train``.
        heldout: Of ``data.eval``.
        preferences: Those the algorithm trains on; empty for most.
        heldout_preferences: Of ``data.eval_preferences``.
        digest: Of what is trained on. Order and ordinals of records are a run's coordinates.
        notes: Lines for the user: how many were kept, dropped, cut.
    """

    demonstrations: list[Demonstration]
    heldout: list[Demonstration] = field(default_factory=list)
    preferences: Sequence[Preference] = ()
    heldout_preferences: Sequence[Preference] = ()
    digest: str = ""
    notes: tuple[str, ...] = ()


def read_corpus(
    recipe: Recipe, tokenizer: Tokenizer, *, preferences: tuple[str, Sequence[str]] | None = None
) -> Corpus:
    """Read and encode every file of a recipe.

    Args:
        preferences: Dotted key and files of the preferences that are trained on.

    Raises:
        UserError: A record or file is wrong; held-out or training preferences without any.
    """
    limits = {
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_response_length": recipe.data.max_response_length,
        "overlong": recipe.data.overlong,
    }
    demonstrations, report = load_demonstrations(recipe.data.train, tokenizer, **limits)
    notes = [f"data.train: {report.summary()}"]
    heldout: list[Demonstration] = []
    if recipe.data.eval:
        heldout, eval_report = load_demonstrations(
            recipe.data.eval, tokenizer, limit=recipe.data.eval_limit, **limits
        )
        notes.append(f"data.eval: {eval_report.summary()}")
    trained_on = _read_preferences(*preferences, recipe, tokenizer, notes) if preferences else []
    heldout_preferences = _read_preferences(
        "data.eval_preferences", recipe.data.eval_preferences, recipe, tokenizer, notes
    )
    digest = digest_of([
        *((d.prompt_ids, d.response_ids) for d in demonstrations),
        *((p.prompt_ids, ids) for p in trained_on for ids in (p.chosen_ids, p.rejected_ids)),
    ])
    return Corpus(
        demonstrations, heldout, trained_on, heldout_preferences, digest, tuple(notes)
    )


def _read_preferences(
    key: str, paths: Sequence[str], recipe: Recipe, tokenizer: Tokenizer, notes: list[str]
) -> Sequence[Preference]:
    if not paths:
        return []
    preferences = load_preferences(
        paths, tokenizer, max_prompt_length=recipe.data.max_prompt_length,
        max_response_length=recipe.data.max_response_length, overlong=recipe.data.overlong,
    )
    if not preferences:
        raise UserError(f"{key}={', '.join(paths)} has no usable preference. Set {key} to files "
                        "that have some, or raise data.max_prompt_length and "
                        "data.max_response_length.")
    notes.append(f"{key}: {preferences.summary()}")
    return preferences
