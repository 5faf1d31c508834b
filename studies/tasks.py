"""Small languages in which an answer can be checked, and demonstrations of them.

A task draws prompts, one demonstration of each, and says whether any answer is right. In some a
prompt has one right answer; in others many, of which the demonstration is one at random.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LETTERS = "abcdefghijkl"


@dataclass(frozen=True)
class Task:
    """A language of prompts and answers over ``LETTERS``.

    Attributes:
        prompt: Draws one, from a generator and its length.
        answer: Draws a right answer of a prompt.
        is_right: Whether an answer is right.
        length: Letters of a prompt.
        longest: Letters of the longest answer that a prompt of the largest length may have.
        habit: Another way to answer, which is not right; a model may have it from earlier training.
    """

    prompt: Callable[[random.Random, int], str]
    answer: Callable[[random.Random, str], str]
    is_right: Callable[[str, str], bool]
    length: int
    longest: int
    habit: Callable[[str], str] | None = None


def _word(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(length))


def _distinct(rng: random.Random, length: int) -> str:
    return "".join(rng.sample(LETTERS, length))


CHAIN = 8  # letters of an answer of ``chain``


def is_chain(prompt: str, answer: str) -> bool:
    """``CHAIN`` letters of the prompt only, none beside itself, each twice or more, closed."""
    return (
        len(answer) == CHAIN
        and set(answer) == set(prompt)
        and all(a != b for a, b in zip(answer, answer[1:], strict=False))
        and all(answer.count(letter) >= 2 for letter in prompt)
        and answer[0] == answer[-1] == prompt[0]
    )


def _draw_chain(rng: random.Random, prompt: str) -> str:
    """Uniform over the right answers, by rejection."""
    while True:
        inner = [rng.choice(prompt) for _ in range(CHAIN - 2)]
        answer = prompt[0] + "".join(inner) + prompt[0]
        if is_chain(prompt, answer):
            return answer


def _draw_subsequence(rng: random.Random, prompt: str) -> str:
    """Half of the prompt's letters, in their order."""
    places = sorted(rng.sample(range(len(prompt)), len(prompt) // 2))
    return "".join(prompt[place] for place in places)


def is_subsequence(prompt: str, answer: str) -> bool:
    """Half as many letters as the prompt, which come in it in this order."""
    rest = iter(prompt)
    return len(answer) == len(prompt) // 2 and all(letter in rest for letter in answer)


TASKS = {
    "reverse": Task(_word, lambda _, p: p[::-1], lambda p, a: a == p[::-1], 4, 6),
    "sort": Task(_word, lambda _, p: "".join(sorted(p)), lambda p, a: a == "".join(sorted(p)),
                 6, 8),
    "chain": Task(_distinct, _draw_chain, is_chain, 3, CHAIN),
    "subsequence": Task(_word, _draw_subsequence, is_subsequence, 8, 5),
    "mirror": Task(_word, lambda _, p: p[::-1], lambda p, a: a == p[::-1], 5, 6, str),
}


@dataclass(frozen=True)
class Example:
    """A prompt, the answer demonstrated, and whether that is right."""

    prompt: str
    answer: str
    is_right: bool


def make_examples(
    task: Task, seed: int, *, train: int, validation: int, test: int, corrupted: float = 0.0,
    test_length: int | None = None, before: int = 0, habit: float = 0.0,
    lengths: Sequence[int] = (),
) -> dict[str, list[Example]]:
    """Demonstrations and held-out prompts; no prompt is in two splits.

    Args:
        corrupted: Share of the training demonstrations whose answers change places.
        test_length: Letters of the test prompts, where they shall be longer than demonstrated.
        before: Examples of what the model is trained on before it sees a demonstration.
        habit: Share of these that are answered by ``Task.habit``.
        lengths: Letters of their prompts, as many of each; none: the task's.
    """
    known: set[str] = set()
    own = random.Random(f"before {seed}")  # the same, whatever comes after
    kinds = lengths or (task.length,)
    earlier = [_by_habit(task, example) if own.random() < habit else example
               for length in kinds
               for example in _examples(task, own, before // len(kinds), length, known)]
    rng = random.Random(seed)
    sizes = {"train": train, "validation": validation}
    splits = {name: _examples(task, rng, size, task.length, known) for name, size in sizes.items()}
    splits["test"] = _examples(task, rng, test, test_length or task.length, known)
    splits["train"] = _corrupt(task, rng, splits["train"], corrupted)
    if before:
        splits["before"] = earlier
    return splits


def _by_habit(task: Task, example: Example) -> Example:
    if task.habit is None:
        raise ValueError("this task has no habit")
    answer = task.habit(example.prompt)
    return Example(example.prompt, answer, task.is_right(example.prompt, answer))


def _examples(
    task: Task, rng: random.Random, count: int, length: int, known: set[str]
) -> list[Example]:
    found: list[Example] = []
    while len(found) < count:
        prompt = task.prompt(rng, length)
        if prompt not in known:
            known.add(prompt)
            found.append(Example(prompt, task.answer(rng, prompt), is_right=True))
    return found


def _corrupt(
    task: Task, rng: random.Random, examples: list[Example], share: float
) -> list[Example]:
    """Move answers from victim to victim, so that the set of answers stays what it was."""
    victims = rng.sample(range(len(examples)), round(share * len(examples)))
    changed = list(examples)
    for place, other in zip(victims, [*victims[1:], *victims[:1]], strict=True):
        prompt, answer = examples[place].prompt, examples[other].answer
        changed[place] = Example(prompt, answer, task.is_right(prompt, answer))
    return changed
