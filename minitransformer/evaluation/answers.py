"""How generated answers are compared with references."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from minitransformer.evaluation.metrics import Totals

WORD = re.compile(r"\w+|[^\w\s]")


def token_f1(answer: str, reference: str) -> float:
    """F1 = 2 · shared / (words of the answer + words of the reference), 1 for two empty texts.

    Rajpurkar et al. 2016 (SQuAD, arXiv 1606.05250), section 6.1, but for articles, capitals and punctuation marks,
    which count here, as answers may be code.
    """
    both = [Counter(WORD.findall(text)) for text in (answer, reference)]
    count = sum(words.total() for words in both)
    return 2 * (both[0] & both[1]).total() / count if count else 1.0


def answer_totals(pairs: Iterable[tuple[str, str]]) -> Totals:
    """The totals over answers and their references, of which the whitespace around them does not count."""
    totals = Totals()
    for answer, reference in pairs:
        totals.texts += 1
        totals.exact += answer.strip() == reference.strip()
        totals.token_f1.append(token_f1(answer, reference))
    return totals
