"""Reference answers: what counts as none, and when a response is the same answer."""

import math
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_irl.data.records import RecordError


def answer_text(value: Any) -> str | None:
    """Return a record's answer as text; None where there is none.

    A whole number is written without a fraction: tables turn integers into floats as soon as one
    of them is missing, and 1.0 is then the 1 that the file meant. NaN stands for a missing one.

    Raises:
        RecordError: It is neither text nor a number.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError('"answer" must be a string or a number')
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return str(int(value))
    return str(value)


def same_answer(response: str, answer: str) -> bool:
    """Whether a response is the answer: the same text, white space around it apart, or number."""
    response, answer = response.strip(), answer.strip()
    if response == answer:
        return True
    numbers = _number(response), _number(answer)
    return None not in numbers and numbers[0] == numbers[1]


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    # Decimal reads "1_000" and "infinity" too; neither is how people write a number.
    return number if number.is_finite() and "_" not in text else None
