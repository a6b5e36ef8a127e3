"""When a written answer counts as right."""

import pytest

from fedsa_secure.data import exact_match
from fedsa_secure.data.answers import final_number

GSM = "He pays 3 * 24 = <<3*24=72>>72 dollars.\n#### 72"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("#### 72", True),
        ("Twelve and sixty.\n####72.", True),
        ("#### $72", True),
        ("#### 72.0", True),
        ("First #### 71, no: #### 72", True),
        ("#### 71", False),
        ("#### 720", False),
        ("#### -72", False),
        ("The answer is 72", False),
        ("", False),
    ],
)
def test_gsm8k_compares_the_number_behind_the_mark(answer, right):
    assert exact_match(answer, GSM) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 1,072", "1072"), ("#### -5", "-5"), ("#### 0.50", "0.5"), ("7", None), ("####", None)],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (" Yes ", "yes", True),
        ("very  good", "Very good", True),
        ("yes.", "yes", False),
        ("good very", "very good", False),
        ("", "yes", False),
        ("#### yes", "#### yes", True),
        ("#### 1", "#### 1 egg", False),
        ("bla #### 1", "#### Step 1\nDo this", False),
        ("no mark", "#### 5", False),
    ],
)
def test_other_answers_have_to_be_met_word_by_word(answer, reference, right):
    assert exact_match(answer, reference) is right
