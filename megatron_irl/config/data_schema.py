"""The recipe's section ``data``; see ``schema``."""

from dataclasses import dataclass, field
from typing import Any, Literal

BadRecords = Literal["drop_empty", "error", "drop"]
FormatName = Literal["auto", "messages", "prompt_response", "alpaca", "sharegpt", "preference"]


@dataclass(frozen=True)
class DataSource:
    """One of several sources of records, with what is particular about it."""

    path: tuple[str, ...]
    """Files, folders or globs, as in ``data.train``."""
    weight: float = 1.0
    """How often each record is taken in a pass over the data: 2 takes it twice, 0.5 takes half of
    the records, 1.5 every record once and half of them twice. Which half follows from a record's
    content and ``data.split.seed``, so more records beside it change nothing."""
    limit: int | None = None
    """Read no more than the first so many records, over all files of the source."""
    split: str | None = None
    """Which split of a folder that has several (``train_sft``); none: ``train``."""
    format: FormatName | None = None
    """As ``data.format``, for this source."""
    fields: dict[str, str] = field(default_factory=dict)
    """As ``data.fields``, for this source."""

    def __str__(self) -> str:
        return ", ".join(self.path)


@dataclass(frozen=True)
class SplitConfig:
    """Records of ``data.train`` that are held out."""

    eval: float
    """Share of the records, in (0, 1), that is evaluated on and not trained on. A record's content
    decides, not its place: records that are added move no other from one side to the other, and
    equal records are on one side."""
    seed: int = 0
    """Another seed holds out other records."""


@dataclass(frozen=True)
class DataConfig:
    """Demonstrations and how long they may be."""

    train: tuple[str | DataSource, ...]
    """A file, or a list: JSON lines, a JSON array, CSV (each also .gz or .zst), Parquet, Arrow, a
    folder of such files or one of ``datasets.save_to_disk``. Globs are expanded in sorted order. An
    entry may be a mapping instead, {path, weight, limit, split, format, fields}, to mix several."""
    eval: tuple[str | DataSource, ...] = ()
    """Held-out demonstrations for evaluation, in the same form."""
    format: FormatName = "auto"
    """Form of the records. ``auto`` tells it by the names of their fields: ``messages``; prompt and
    response as they are, without a chat template (``prompt_response``); an instruction or question
    and its answer as turns of a chat (``alpaca``); ``conversations`` (``sharegpt``); the chosen
    answer of a ``preference``. Another value admits that form only."""
    fields: dict[str, str] = field(default_factory=dict)
    """For files with other names: ours mapped to theirs, as in {question: Q, answer: A} or
    {messages: dialog, role: speaker, content: utterance}."""
    split: SplitConfig | None = None
    """Hold out a share of ``data.train`` in place of ``data.eval``: {eval: 0.05, seed: 7}."""
    bad_records: BadRecords = "drop_empty"
    """A record that cannot be used ends the run with its file and line (``error``), or is left out,
    counted and named in the log (``drop``). ``drop_empty`` leaves out those whose answer is empty,
    of which public files have some, as long as they are no more than a tenth; any other is an
    error."""
    max_prompt_length: int = 512
    """Longest prompt in tokens, chat header included."""
    max_response_length: int = 512
    """Longest demonstration response in tokens, EOS included."""
    tokenizer: str | None = None
    """Tokenizer folder; none: the one in ``model.hf``."""
    chat_template: str | None = None
    """Jinja chat template, or a file holding one; none: the tokenizer's."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, as in {enable_thinking: false}; a record's own
    ``chat_template_kwargs`` win."""
    turns: Literal["last", "each", "all"] = "last"
    """Which of a conversation's assistant turns are learnt: the ``last``; ``each`` of them, as a
    record of its own with what came before it; or ``all`` in one sequence (sft only). A chat
    template that rewrites earlier turns makes ``each`` of ``all``, and the log says so. Held-out
    records are taken as ``each`` under both, so that the likelihood is of the same tokens."""
    overlong: Literal["drop", "error", "truncate_prompt"] = "drop"
    """What to do with a record over a limit, of demonstrations or preferences: drop and count it,
    stop, or keep the prompt's end. A response is never cut, since that would teach the model to
    stop nowhere; one over its limit is dropped under ``truncate_prompt`` too."""
    eval_limit: int | None = None
    """Use the first so many records of ``data.eval``; none: all of them."""
    eval_preferences: tuple[str | DataSource, ...] = ()
    """Held-out preference files ({"prompt", "chosen", "rejected"} records) the run never trains
    on; each round reports how often the reward prefers ``chosen``. Not for sft."""
