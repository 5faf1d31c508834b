"""When a response is the reference answer."""

import re
from decimal import Decimal, InvalidOperation

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def same_answer(response: str, answer: str) -> bool:
    """Whether a response is the answer: the same text, white space around it apart, or number.

    1, 1.0 and 1.00 are one number; tables turn integers into floats as soon as one of them is
    missing, and whether the answer or the response was written as one says nothing.
    """
    # Where a response is worked out before its answer (GSM8K), the answer follows four hashes.
    response, answer = response.rpartition("####")[2].strip(), answer.strip()
    if response == answer:
        return True
    numbers = _number(response), _number(answer)
    return None not in numbers and numbers[0] == numbers[1]


def _number(text: str) -> Decimal | None:
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    # Decimal reads "1_000" and "infinity" too; neither is how people write a number.
    return number if number.is_finite() and "_" not in text else None
