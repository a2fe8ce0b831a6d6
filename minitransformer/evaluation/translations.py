"""How translations are compared with references: by sacrebleu, whose signatures make scores comparable."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError

SCORES = {"bleu": "BLEU", "chrf": "CHRF"}
"""metrics, and their classes in sacrebleu"""


def translation_columns(translations: Sequence[str], references: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """[items, statistics] what BLEU and chrF count of each translation; they are computed from the sums.

    Raises `UserError` without sacrebleu.
    """
    # sacrebleu offers no public way to these; its own resampling and paired tests begin with the same call.
    return {
        name: np.array(_scorer(name)._extract_corpus_statistics(list(translations), [list(references)]), np.float64)
        for name in SCORES
    }


def score_of(name: str, statistics: npt.NDArray[Any]) -> float:
    """BLEU or chrF, from 0 to 100, of translations with these sums of statistics."""
    return float(_scorer(name)._compute_score_from_stats(statistics.tolist()).score)


def signature_of(name: str) -> str:
    """How sacrebleu computes the score, by which published scores are comparable."""
    return str(_scorer(name).get_signature())


@cache
def _scorer(name: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError('BLEU and chrF need sacrebleu, which is not installed: pip install -e ".[eval]"') from None
    scorer = getattr(metrics, SCORES[name])()
    scorer.num_refs = 1  # the signature says so, before there are references
    return scorer
