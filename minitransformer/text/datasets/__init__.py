"""Kinds of data: each becomes token ids on disk by one pipeline, and yields batches of them."""

from minitransformer.text.datasets.base import BatchShape, DataRequest, Dataset, PreparedData
from minitransformer.text.datasets.pairs import Pairs
from minitransformer.text.datasets.text import PlainText

__all__ = ["BatchShape", "DataRequest", "Dataset", "Pairs", "PlainText", "PreparedData"]
