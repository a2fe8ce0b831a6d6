"""How translations are compared with references: by sacrebleu, whose signatures make scores comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minitransformer.errors import UserError
from minitransformer.evaluation.intervals import RESAMPLES


@dataclass(frozen=True)
class CorpusScore:
    """A score from 0 to 100 of all translations together, with a 95% interval over resampled pairs."""

    name: str
    score: float
    low: float
    high: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.score:.1f} (95% interval {self.low:.1f} to {self.high:.1f})\n  {self.signature}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> list[CorpusScore]:
    """BLEU and chrF: Papineni et al. 2002; Popović 2015; Post 2018 (sacrebleu, arXiv 1804.08771).

    Their intervals are the 95% bootstrap intervals of sacrebleu (Koehn 2004).
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise UserError('BLEU and chrF need sacrebleu, which is not installed: pip install -e ".[eval]"') from None
    # A reference is given to the metric, and not with the translations, so that its statistics are computed once.
    made = [metric(references=[list(references)]) for metric in (BLEU, CHRF)]
    found = []
    for metric in made:
        score: Any = metric.corpus_score(list(translations), None, n_bootstrap=RESAMPLES)
        mean, half = score._mean, score._ci
        found.append(CorpusScore(score.name, score.score, mean - half, mean + half, str(metric.get_signature())))
    return found
