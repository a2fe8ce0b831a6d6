"""Drawing a token by a race of exponential random numbers, in which the rounding of sums decides next to nothing.

Where the cumulative distribution is inverted, every boundary between two tokens moves as sums round differently, as in
batches of another size. In a race, only a lead that is smaller than the rounding can change.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ONE_ROUND = 512
"""a larger vocabulary races in two rounds"""
NUMBERS_AT_ONCE = 4096
LEAST = 2.0**-54
"""in place of an exponential number that is 0, as one of 2⁵³ is"""


def draw(logits: Float[Tensor, "samples vocab"], numbers: Float[Tensor, "samples numbers"]) -> Int[Tensor, "samples"]:
    """A token by the softmax of its logits: argmaxᵢ wᵢ / Eᵢ for independent exponentials Eᵢ is i with probability ∝ wᵢ.

    Efraimidis & Spirakis 2006 (Inf. Process. Lett. 97); Maddison et al. 2014 (arXiv 1411.0030), section 2, take its
    logarithm: argmaxᵢ logitᵢ + Gᵢ (Gumbel 1954). `numbers` are of `race_numbers`. A large vocabulary races in two
    rounds, groups of tokens by their sums S and then those of the winner: (S_g / Σ S) · (wᵢ / S_g), with fewer numbers.
    """
    weights = logits.softmax(-1)
    vocab = weights.size(1)
    if vocab <= ONE_ROUND:
        return (weights / numbers).argmax(-1)
    groups, size = groups_of(vocab)
    winner = (_sums(weights, size) / numbers.narrow(1, 0, groups)).argmax(-1, keepdim=True) * size
    tokens = winner + torch.arange(size, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocab - 1)) * (tokens < vocab)
    return winner.squeeze(1) + (inside / numbers.narrow(1, groups, size)).argmax(-1)


def groups_of(vocab: int) -> tuple[int, int]:
    """The number of groups of tokens, about as many as their size, and their size; the last has fewer, or none."""
    size = 1 << ((vocab - 1).bit_length() + 1) // 2
    return vocab // size + 1, size


def _sums(weights: Float[Tensor, "samples vocab"], size: int) -> Float[Tensor, "samples groups"]:
    whole = weights.size(1) // size * size
    last = weights.narrow(1, whole, weights.size(1) - whole).sum(-1, keepdim=True)
    return torch.cat([weights.narrow(1, 0, whole).unflatten(1, (-1, size)).sum(-1), last], dim=1)


def race_numbers(generator: torch.Generator, vocab: int) -> Iterator[Float[np.ndarray, "numbers"]]:
    """The exponential random numbers of one text, for one token of `vocab` after another, without end.

    They depend on `generator` alone: one for each token, or one for each group and one for each place in a group. They
    are made of 53 random bits and stay fine near 0, so that a probability of 1e-9 is what it should be. SFC64 is Doty-
    Humphrey's generator of PractRand, as NumPy has it; the ziggurat method is Marsaglia & Tsang's (2000, JSS 5 (8)).
    """
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    count = vocab if vocab <= ONE_ROUND else sum(groups_of(vocab))
    source = np.random.Generator(np.random.SFC64(seed))
    while True:
        exponential = source.standard_exponential((max(1, NUMBERS_AT_ONCE // count), count))
        yield from exponential.clip(LEAST).astype(np.float32)
