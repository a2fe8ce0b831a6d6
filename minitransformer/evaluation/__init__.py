"""Evaluation of models: metrics by name."""

from minitransformer.evaluation.metrics import Metric, OtherNumber, Totals, metric_called

__all__ = ["Metric", "OtherNumber", "Totals", "metric_called"]
