"""Instructions that a program can check, and follow by editing a draft.

The instructions are IFEval's (arXiv 2311.07911), in its words, and lm-eval's checkers judge the
answers; lm-eval is imported when the first answer is judged.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_irl.errors import UserError

INSTALL = "pip install 'lm-eval[ifeval]>=0.4.13'"


@dataclass(frozen=True)
class Instruction:
    """What an answer shall be like.

    Attributes:
        checker: lm-eval's name of it.
        text: IFEval's words.
        edit: Makes a draft follow it.
    """

    checker: str
    text: str
    edit: Callable[[str], str]


def _quoted(draft: str) -> str:
    """In double quotation marks; those inside become single ones."""
    return '"' + draft.strip().strip('"').strip().replace('"', "'") + '"'


INSTRUCTIONS = {
    "quotation": Instruction(
        "startend:quotation", "Wrap your entire response with double quotation marks.", _quoted),
    "lowercase": Instruction(
        "change_case:english_lowercase",
        "Your entire response should be in English, and in all lowercase letters. No capital "
        "letters are allowed.", str.lower),
    "no_comma": Instruction(
        "punctuation:no_comma", "In your entire response, refrain from the use of any commas.",
        lambda draft: draft.replace(",", "")),
}


def instruction_of(prompt: str) -> str:
    """The name of the instruction that a prompt ends with."""
    (name,) = (n for n, instruction in INSTRUCTIONS.items() if prompt.endswith(instruction.text))
    return name


def follows(name: str, answer: str) -> bool:
    """Whether lm-eval's checker accepts the answer; an empty one never, as in IFEval's strict
    accuracy."""
    return bool(answer.strip()) and bool(_checker(INSTRUCTIONS[name].checker)(answer))


@functools.cache
def _checker(name: str) -> Callable[[str], bool]:
    instruction = _registry()[name](name)
    instruction.build_description()
    return instruction.check_following


def _registry() -> Mapping[str, Any]:
    try:
        import langdetect
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError as error:
        raise UserError(f"this study's answers are judged by lm-eval's checkers of IFEval, and "
                        f"{error.name} is not installed. Run: {INSTALL}") from error
    langdetect.DetectorFactory.seed = 0  # it guesses a language by sampling
    return instructions_registry.INSTRUCTION_DICT
