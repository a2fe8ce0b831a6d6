"""Kinds of data: each becomes token ids on disk by one pipeline, and yields batches of them."""

from minitransformer.text.datasets.pairs import PairPreparation, PreparedPairs
from minitransformer.text.datasets.text import PreparedText, TextPreparation

__all__ = ["PairPreparation", "PreparedPairs", "PreparedText", "TextPreparation"]
