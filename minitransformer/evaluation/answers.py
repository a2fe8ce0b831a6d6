"""How generated answers are compared with references."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from minitransformer.evaluation.items import Items

WORD = re.compile(r"\w+|[^\w\s]")


def token_f1(answer: str, reference: str) -> float:
    """F1 = 2 · shared / (words of the answer + words of the reference), 1 for two empty texts.

    Rajpurkar et al. 2016 (SQuAD, arXiv 1606.05250), section 6.1, but for articles, capitals and punctuation marks,
    which count here, as answers may be code.
    """
    both = [Counter(WORD.findall(text)) for text in (answer, reference)]
    count = sum(words.total() for words in both)
    return 2 * (both[0] & both[1]).total() / count if count else 1.0


def answer_items(pairs: Iterable[tuple[str, str]]) -> Items:
    """What is counted of answers and their references, of which the whitespace around them does not count."""
    found = [(answer.strip() == reference.strip(), token_f1(answer, reference)) for answer, reference in pairs]
    exact, f1 = np.array(found, np.float64).reshape(-1, 2).T
    return Items({"texts": np.ones(len(found), np.int64), "exact": exact.astype(np.int64), "token_f1": f1})
