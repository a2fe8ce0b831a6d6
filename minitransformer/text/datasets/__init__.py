"""Datasets: each kind of data is tokenized by the same pipeline, and yields batches."""

from minitransformer.text.datasets.base import BatchShape, DataRequest, Dataset, PreparedData
from minitransformer.text.datasets.conversations import Conversations
from minitransformer.text.datasets.labels import Labels
from minitransformer.text.datasets.pairs import Pairs
from minitransformer.text.datasets.pipeline import NotPrepared
from minitransformer.text.datasets.plain_text import PlainText

__all__ = [
    "BatchShape",
    "Conversations",
    "DataRequest",
    "Dataset",
    "Labels",
    "NotPrepared",
    "Pairs",
    "PlainText",
    "PreparedData",
]
