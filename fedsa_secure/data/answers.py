"""When a written answer is right."""

import re

_MARK = "####"
_NUMBER = re.compile(r"-?[\d.,]*\d")
_LAST_LINE = re.compile(r"(^|\n)#### *\$?-?[\d.,]*\d\s*$")


def exact_match(answer: str, reference: str) -> bool:
    """Whether an answer says the same as its reference.

    A reference in GSM8K's form has ``#### number`` as its last line; then only that number counts,
    without separators of thousands, and an answer without it is wrong. Other references have to be
    met word by word; case and white space do not count.

    Source: Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021 (GSM8K).
    """
    if _LAST_LINE.search(reference):
        return final_number(answer) == final_number(reference)
    return answer.lower().split() == reference.lower().split()


def final_number(text: str) -> str | None:
    """The number behind the last ``####``, or None if there is none.

    >>> final_number("48/2 = 24 clips. #### 1,072")
    '1072'
    """
    _, mark, tail = text.rpartition(_MARK)
    found = _NUMBER.search(tail) if mark else None
    if found is None:
        return None
    digits = found.group().replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
