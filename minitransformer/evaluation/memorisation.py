"""What a model repeats of its training text: texts that it continues verbatim, and runs of tokens that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import wilson_interval
from minitransformer.evaluation.items import resampled_weights

REPETITIONS = {"once": (1, 1), "2 to 9 times": (2, 9), "10 times or more": (10, None)}
"""groups of texts by how often they stand in the training text"""


@dataclass(frozen=True)
class Extraction:
    """Texts of which a prefix is given, and how many tokens of the rest greedy decoding continues it by verbatim.

    Carlini et al. 2022, "Quantifying Memorization Across Neural Language Models" (arXiv 2202.07646), section 3.
    """

    verbatim: npt.NDArray[np.int64]
    """[texts] tokens up to the first one that differs"""
    length: int
    """tokens of each rest"""

    @property
    def complete(self) -> int:
        """Texts that are continued to their end."""
        return int((self.verbatim == self.length).sum())

    def by_repetitions(self, times: npt.NDArray[np.int64]) -> Iterator[tuple[str, Extraction]]:
        """Those texts that stand in the training text once, several times and often, by their `times` [texts]."""
        for name, (least, most) in REPETITIONS.items():
            chosen = (times >= least) & (times <= (most or times.max(initial=0)))
            if chosen.any():
                yield name, Extraction(self.verbatim[chosen], self.length)

    def to_json(self) -> dict[str, Any]:
        texts = len(self.verbatim)
        return {
            "texts": texts,
            "extracted": self.complete,
            "share": self.complete / texts,
            "interval": list(wilson_interval(self.complete, texts)),
            "mean_verbatim_tokens": float(self.verbatim.mean()),
        }


def overlap_record(shares: Mapping[int, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """The mean share of tokens in runs of at least so many tokens that stand in the training text, as JSON.

    The intervals are of texts that are drawn again with replacement.
    """
    return {
        str(least): {"share": float(of.mean()), "interval": _resampled_interval(of)} for least, of in shares.items()
    }


def _resampled_interval(shares: npt.NDArray[np.float64]) -> list[float]:
    means = [float(weights @ shares) / len(shares) for weights in resampled_weights(len(shares))]
    found: list[float] = np.quantile(means, (0.025, 0.975)).tolist()
    return found
