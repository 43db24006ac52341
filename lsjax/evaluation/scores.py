"""Scores of one generated text against its reference, each in 0..1.

ROUGE is that of the package rouge-score: the F-measure, without stemming. That package puts texts into lower case and
takes everything but a-z and 0-9 for space, so punctuation, accents and other scripts do not count.
"""

import functools
import re
from collections.abc import Callable

from lsjax.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def normalize_space(text: str) -> str:
    """Returns a text with each run of white space as one space, and none at its ends."""
    return " ".join(text.split())


def exact_match(text: str, reference: str) -> float:
    """Returns 1 if both texts are equal after `normalize_space`."""
    return float(normalize_space(text) == normalize_space(reference))


def contains(text: str, reference: str) -> float:
    """Returns 1 if the reference stands in the text, both after `normalize_space`."""
    return float(normalize_space(reference) in normalize_space(text))


def rouge(text: str, reference: str) -> dict[str, float]:
    """Returns ROUGE-1, ROUGE-2 and ROUGE-L. Raises UserError when rouge-score is not installed."""
    scores = rouge_scorer().score(reference, text)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@functools.cache
def rouge_scorer():
    """Returns the scorer of rouge-score. Raises UserError that names the extra when it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs rouge-score: pip install 'rouge-score>=0.1.2', or install lsjax[eval]") from None
    return RougeScorer(list(ROUGE))


def final_number(text: str) -> str | None:
    """Returns the answer of a calculation: the first number after the last "####", or else the last number.

    Numbers lose their commas and a fraction of zeros, so "1,200.00" is "1200". Returns None where there is none.
    """
    _, marked, answer = text.rpartition("####")
    found = _NUMBER.findall(answer if marked else text)
    if not found:
        return None
    number = found[0 if marked else -1].replace(",", "")
    return re.sub(r"\.0+$", "", number)


def _rouge(name: str) -> Callable[[str, str], float]:
    def score(text: str, reference: str) -> float:
        return rouge(text, reference)[name]

    return score


# What a text of custom:FILE.jsonl may be scored with.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    **{name: _rouge(name) for name in ROUGE},
}
