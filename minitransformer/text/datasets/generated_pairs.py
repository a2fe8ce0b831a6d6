"""Pairs that a recipe makes up: fresh ones for every batch, and a fixed set of held-out ones for validation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.datasets.pair_data import PairData, framed_but_last, split_line, vocabularies
from minitransformer.text.folders import work_folder
from minitransformer.text.pairs import Pair
from minitransformer.text.token_files import Ragged, TokenPairs, Tokens
from minitransformer.text.tokenizers import Bytes, Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.pair_batches import PairBatch

VALIDATION_PAIRS = 500
# Batches are cut from a pool of fresh pairs, so that those of similar length can stand together.
POOL = 16

Draw = Callable[[random.Random, bool], Pair]
"""A pair from the generator; one that training never has, if asked for"""
Sides = tuple[Tokens, Tokens]


@dataclass(frozen=True)
class GeneratedPairs:
    """Batches of pairs that `draw` makes up, without end and never twice the same; otherwise as ShuffledPairs.

    A pair of which a side, with its end token, is longer than `context_length` is drawn again.
    """

    draw: Draw
    tokenizer: Tokenizer
    context_length: int
    batch_tokens: int
    seed: int

    def batch(self, index: int) -> PairBatch:
        """Batch number `index`: a function of seed and index alone, so a run resumes, or skips, at any of them."""
        from minitransformer.text.pair_batches import ShuffledPairs

        number, place = divmod(index, POOL)
        pool = _pool(self, number)
        end = self.tokenizer.pair_framing.after[-1]
        batches = ShuffledPairs(pool, self.batch_tokens, end, end, self.seed, self.tokenizer.target_start)
        return batches.batch(place)


@lru_cache(maxsize=2)
def _pool(batches: GeneratedPairs, number: int) -> TokenPairs:
    """Fresh pairs for POOL batches or a few more: which ones are left over is left to chance."""
    generator = random.Random(f"{batches.seed} {number}")
    drawn: list[Sides] = []
    tokens = 0
    while tokens < POOL * batches.batch_tokens:
        pair = _encoded(batches.draw(generator, False), batches.tokenizer)
        if longest(pair) <= batches.context_length:
            drawn.append(pair)
            # No batch holds more than this of its pairs, so there are enough for POOL.
            tokens += min(longest(pair), batches.batch_tokens)
    return _joined(drawn)


def _encoded(pair: Pair, tokenizer: Tokenizer) -> Sides:
    source, target = (framed_but_last(tokenizer.encode_array(text), tokenizer) for text in pair)
    return source, target


def longest(pair: Sides) -> int:
    """The tokens of the longer side, with its end."""
    return max(map(len, pair)) + 1


def _joined(pairs: list[Sides]) -> TokenPairs:
    sources, targets = (Ragged.join(side, np.dtype("<u4")) for side in zip(*pairs, strict=True))
    return TokenPairs(sources, targets)


class PairRecipe(recipes.Recipe, Protocol):
    """A recipe that makes up pairs."""

    def pair(self, generator: random.Random, held_out: bool) -> Pair:
        """A pair that depends on the generator alone; those with `held_out` are no others' and only validation's."""


@dataclass(frozen=True)
class GeneratedData(PairData):
    """Pairs that the recipe called `name` makes up; nothing of them is kept in `folder`."""

    name: str
    draw: Draw
    context_length: int

    def training_batches(self, seed: int) -> GeneratedPairs:
        return GeneratedPairs(self.draw, self.tokenizer, self.context_length, self.batch_tokens, seed)

    def pairs(self, split: str) -> TokenPairs:
        if split != "validation":
            raise UserError(f"{self.name} makes pairs up without end, and there is no whole of them: name a file")
        return self.validation

    def summary(self) -> str:
        """Three lines to print, of less than 80 columns."""
        return (
            f"{vocabularies(self.tokenizer, self.target_tokenizer)}\n"
            f"train      {self.name}: fresh pairs for every batch\n"
            f"{split_line('validation', self.validation)}"
        )


def generates_pairs(name: str) -> bool:
    """Whether `name` is a recipe that makes up pairs."""
    return name in recipes.known() and hasattr(recipes.load_recipe(name), "pair")


def generate_pairs(name: str, tokenizer: Tokenizer | None = None, *, context_length: int) -> GeneratedData:
    """The pairs that the recipe called `name` makes up, as ids of `tokenizer` (default: bytes) for both sides.

    Raises `UserError` for a recipe without pairs, and when one of validation is longer than the context.
    """
    recipe = cast(PairRecipe, recipes.load_recipe(name))
    if not generates_pairs(name):
        raise UserError(f"recipe {name} makes no pairs: choose {', '.join(filter(generates_pairs, recipes.known()))}")
    tokenizer = Bytes() if tokenizer is None else tokenizer
    generator = random.Random("validation")
    validation = [_encoded(recipe.pair(generator, True), tokenizer) for _ in range(VALIDATION_PAIRS)]
    needed = max(map(longest, validation))
    if needed > context_length:
        raise UserError(
            f"{name} asks for up to {needed} tokens a side, and the context has {context_length}: "
            f"choose --context-length {needed} or more"
        )
    version = recipes.made_at(name, recipe).stem
    folder = work_folder() / "prepared" / f"{version}-{tokenizer.fingerprint[:4]}"
    return GeneratedData(folder, tokenizer, tokenizer, _joined(validation), name, recipe.pair, context_length)
