"""Drawing a token by a race of exponential random numbers, in which the rounding of sums decides next to nothing.

Where the cumulative distribution is inverted, every boundary between two tokens moves as sums round differently, as in
batches of another size. In a race, only a lead that is smaller than the rounding can change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP_SIZE = 512
"""tokens of one round: a larger vocabulary takes two"""
NUMBERS_AT_ONCE = 4096
LEAST = 2.0**-54
"""in place of a uniform number that is 0; the next larger one is twice it"""


def draw(logits: Float[Tensor, "samples vocab"], numbers: Float[Tensor, "samples numbers"]) -> Int[Tensor, "samples"]:
    """A token by the softmax of its logits: argmaxᵢ wᵢ / Eᵢ for independent exponentials Eᵢ is i with probability ∝ wᵢ.

    Efraimidis & Spirakis 2006 (Inf. Process. Lett. 97); Maddison et al. 2014 (arXiv 1411.0030), section 2, take its
    logarithm: argmaxᵢ logitᵢ + Gᵢ (Gumbel 1954). `numbers` are of `race_numbers`. A large vocabulary races in two
    rounds, groups of tokens by their sums S and then those of the winner: (S_g / Σ S) · (wᵢ / S_g), with fewer numbers.
    """
    weights = logits.softmax(-1)
    vocab, groups = weights.size(1), numbers_of_groups(weights.size(1))
    if not groups:
        return (weights / numbers).argmax(-1)
    winner = (_sums_of_groups(weights) / numbers.narrow(1, 0, groups)).argmax(-1, keepdim=True)
    tokens = winner * GROUP_SIZE + torch.arange(GROUP_SIZE, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocab - 1)) * (tokens < vocab)
    first = (inside / numbers.narrow(1, groups, GROUP_SIZE)).argmax(-1, keepdim=True)
    return (winner * GROUP_SIZE + first).squeeze(1)


def numbers_of_groups(vocab: int) -> int:
    """How many groups race before their tokens do: none where one round is enough. The last may be empty."""
    return vocab // GROUP_SIZE + 1 if vocab > GROUP_SIZE else 0


def _sums_of_groups(weights: Float[Tensor, "samples vocab"]) -> Float[Tensor, "samples groups"]:
    whole = weights.size(1) // GROUP_SIZE * GROUP_SIZE
    rest = weights.narrow(1, whole, weights.size(1) - whole)
    sums = weights.narrow(1, 0, whole).unflatten(1, (-1, GROUP_SIZE)).sum(-1)
    return torch.cat([sums, rest.sum(-1, keepdim=True)], dim=1)


def race_numbers(generator: torch.Generator, vocab: int, device: torch.device) -> Iterator[Float[Tensor, "numbers"]]:
    """The exponential random numbers of one text, for one token of `vocab` after another, without end.

    They depend on `generator` alone: one for each group, and one for each place in a group. Of 53 random bits, so that
    a token of probability 1e-9 is drawn as often as it should.
    """
    groups = numbers_of_groups(vocab)
    count = groups + GROUP_SIZE if groups else vocab
    while True:
        uniform = torch.rand(max(1, NUMBERS_AT_ONCE // count), count, generator=generator, dtype=torch.float64)
        yield from exponential(uniform).to(device, non_blocking=True).unbind()


def exponential(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """E = −log(1 − u) of u in [0, 1): never 0 or infinite, and fine near 0, where the winners are."""
    return -torch.log1p(-uniform.clamp(min=LEAST))
