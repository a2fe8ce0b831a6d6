"""Exposure: how much likelier a model finds a planted secret than others that it might have been.

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import wilson_interval

Array = npt.NDArray[np.float64]
MOST_SKEW = 0.99
"""a skew-normal distribution has less than 0.9953"""
POINTS, DEVIATIONS = 20_001, 12
"""of a numerical integral, and how many deviations it goes beyond its end"""
ASYMPTOTIC = -30.0
"""below it, log Φ is taken from its asymptotic series"""


@dataclass(frozen=True)
class Exposure:
    """−log₂ of the share of secrets that are as likely as the planted one, in bits: log₂ |R| − log₂ rank.

    A secret that the model has never seen reaches e bits with probability 2⁻ᵉ, and 1.4 on average.
    """

    rank: float
    """1 + the number of likelier secrets + ½ for each that is as likely"""
    others: int
    """secrets that it is compared with"""
    is_exact: bool
    """whether these are all"""
    fitted: float | None
    """bits by a skew-normal distribution fitted to the others; None if these are all alike"""

    @property
    def bits(self) -> float:
        """By rank: at most log₂(others + 1)."""
        return math.log2((self.others + 1) / self.rank)

    @property
    def interval(self) -> tuple[float, float | None]:
        """95% confidence interval, as the others are a sample; None where it has no upper end."""
        if self.is_exact:
            return self.bits, self.bits
        low, high = wilson_interval(self.rank - 1, self.others)
        return -math.log2(high), -math.log2(low) if self.rank > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "exposure": self.bits,
            "interval": list(self.interval),
            "fitted": self.fitted,
            "rank": self.rank,
            "others": self.others,
            "exact": self.is_exact,
        }


def exposure(nats: float, others: Array, num_secrets: int) -> Exposure:
    """The exposure of a text of `nats` = −log p among `others` [texts], which differ from it in the secret alone."""
    rank = 1 + int((others < nats).sum()) + (others == nats).sum() / 2
    return Exposure(float(rank), len(others), len(others) + 1 == num_secrets, _fitted_bits(nats, others))


def _fitted_bits(nats: float, others: Array) -> float | None:
    """−log₂ ∫ p over what is below `nats`, of the skew-normal p with the mean, deviation and skewness of `others`.

    p(x) = 2/ω φ(z) Φ(αz), z = (x − ξ)/ω. Azzalini 1985, "A class of distributions which includes the normal ones".
    """
    deviation = others.std()
    if deviation <= 1e-9 * max(1.0, abs(others.mean())):
        return None
    skew = float(np.clip((((others - others.mean()) / deviation) ** 3).mean(), -MOST_SKEW, MOST_SKEW))
    power = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    omega = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    xi = others.mean() - omega * delta * math.sqrt(2 / math.pi)
    end = (nats - xi) / omega
    z = np.linspace(min(end, 0.0) - DEVIATIONS, end, POINTS)
    log_p = math.log(2 / math.sqrt(2 * math.pi)) - z**2 / 2 + _log_normal_cdf(delta / math.sqrt(1 - delta**2) * z)
    top = log_p.max()
    tail = np.trapezoid(np.exp(log_p - top), z)
    return max(0.0, -float(top + math.log(tail)) / math.log(2))


def _log_normal_cdf(u: Array) -> Array:
    """log Φ(u)."""
    near = np.maximum(u, ASYMPTOTIC)
    exact = np.log(np.vectorize(math.erfc)(-near / math.sqrt(2)) / 2)
    return np.where(u >= ASYMPTOTIC, exact, -(u**2) / 2 - np.log(np.maximum(-u, 1) * math.sqrt(2 * math.pi)))
