"""The embedded data set: words and phrases with the sign of their human sentiment rating.

Source: the lexicon of VADER (Hutto and Gilbert, ICWSM 2014), as the package ``vaderSentiment``
ships it: 7.5k entries, each rated by ten people from -4 to 4.
"""

import importlib.util
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from fedsa_secure.errors import MissingExtraError

NAME = "lexicon"
_STEM_LENGTH = 4


def load_lexicon() -> Dataset:
    """All entries with columns text, label (negative, positive) and stem.

    The stem is the first four letters in lower case, so that *foolish* and *foolishly* can be kept
    on one side of a split. Entries with a mean rating of zero have no sign and are left out.

    Raises:
        MissingExtraError: if ``vaderSentiment`` is not installed.
    """
    found = importlib.util.find_spec("vaderSentiment")
    if found is None or found.origin is None:
        raise MissingExtraError("vaderSentiment", "demo")
    lines = (Path(found.origin).parent / "vader_lexicon.txt").read_text(encoding="utf-8")
    rows = [line.split("\t")[:2] for line in lines.splitlines() if line.strip()]
    rated = [(text.strip(), float(mean)) for text, mean in rows if float(mean) != 0]
    return Dataset.from_dict(
        {
            "text": [text for text, _ in rated],
            "label": [int(mean > 0) for _, mean in rated],
            "stem": [text.lower()[:_STEM_LENGTH] for text, _ in rated],
        },
        features=Features(
            text=Value("string"),
            label=ClassLabel(names=["negative", "positive"]),
            stem=Value("string"),
        ),
    )
