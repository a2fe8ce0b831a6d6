"""Evaluation of models: metrics by name."""

from minitransformer.evaluation.items import Totals
from minitransformer.evaluation.metrics import Metric, OtherNumber, metric_called

__all__ = ["Metric", "OtherNumber", "Totals", "metric_called"]
