"""The answer of a response that is worked out first, and numbers with thousands set apart."""

import pytest

from megatron_irl.data.answers import same_answer


@pytest.mark.parametrize(("response", "answer", "same"), [
    ("3 + 4 = <<3+4=7>>7\n#### 7", "7", True),
    ("3 + 4 = 7\n#### 8", "7", False),
    ("7", "7", True),
    ("first #### 1, no: #### 7", "7", True),
    ("#### 1,234", "1234", True),
    ("#### 1234.0", "1,234", True),
    ("12,34", "1234", False),
    ("It is 7", "7", False),
])
def test_same_answer(response, answer, same):
    assert same_answer(response, answer) is same
