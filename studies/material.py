"""What a task's files hold: words of letters, or questions to a pretrained model."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from studies.drafts import Questions
from studies.tasks import TASKS, Example, make_examples

Record = dict[str, Any]


class Material(Protocol):
    """Prompts, demonstrations, and how answers are sampled and judged.

    Attributes:
        generate, score: Options of these commands of ``megatron-irl``.
        samples: Answers to each held-out prompt, at temperature 1.
        recipe: What the recipes of all methods have otherwise than ``methods.recipe_of`` says.
    """

    generate: Sequence[Any]
    score: Sequence[Any]
    samples: int
    recipe: Mapping[str, Any]

    def splits(self, seed: int, sizes: Mapping[str, Any]) -> dict[str, list[Record]]:
        """The records of each split; none has a prompt of another."""
        ...

    def needs_drafts(self, task: Mapping[str, Any]) -> bool:
        """Whether demonstrations are made from the starting model's own answers."""
        ...

    def demonstrations(
        self, records: Sequence[Record], drafts: Sequence[Record], task: Mapping[str, Any],
        seed: int,
    ) -> list[Record]:
        """Demonstrations with ``is_right``, from the training records and a draft of each."""
        ...

    def key(self, record: Mapping[str, Any]) -> str:
        """What a record's prompt is known by."""
        ...

    def is_right(self, key: str, answer: str) -> bool:
        """Whether an answer to the prompt of this key is right."""
        ...


class Letters:
    """Words and answers of ``tasks``; demonstrations are right unless the task says otherwise."""

    generate: Sequence[Any] = ("--max-new-tokens", 12)
    score: Sequence[Any] = ()
    samples = 8
    recipe: Mapping[str, Any] = {}

    def __init__(self, name: str) -> None:
        self._task = TASKS[name]

    def splits(self, seed: int, sizes: Mapping[str, Any]) -> dict[str, list[Record]]:
        """Prompts end with an equals sign."""
        splits = make_examples(self._task, seed, **sizes)
        return {name: list(map(self._record, examples)) for name, examples in splits.items()}

    def needs_drafts(self, task: Mapping[str, Any]) -> bool:
        """If a share of them is never edited."""
        return bool(task.get("unedited"))

    def demonstrations(
        self, records: Sequence[Record], drafts: Sequence[Record], task: Mapping[str, Any],
        seed: int,
    ) -> list[Record]:
        """The share ``unedited`` has the draft for its answer."""
        answers = {line["prompt"]: line["response"] for line in drafts}
        mixed, rng = list(records), random.Random(seed)
        for place in rng.sample(range(len(mixed)), round(task["unedited"] * len(mixed))):
            word = self.key(mixed[place])
            if answer := answers[mixed[place]["prompt"]]:  # an empty one is no demonstration
                mixed[place] = self._record(Example(word, answer, self.is_right(word, answer)))
        return mixed

    def key(self, record: Mapping[str, Any]) -> str:
        """The word."""
        return record["prompt"].removesuffix("=")

    def is_right(self, key: str, answer: str) -> bool:
        """As the task says."""
        return self._task.is_right(key, answer)

    @staticmethod
    def _record(example: Example) -> Record:
        return {"prompt": example.prompt + "=", "response": example.answer,
                "is_right": example.is_right}  # for the measurement; training does not read it


def material_of(name: str) -> Material:
    """What the task of this name works on."""
    return Questions() if name == "instructions" else Letters(name)
