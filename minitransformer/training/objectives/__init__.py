"""Training objectives: one class each, with its batches and loss."""

from minitransformer.training.objectives.base import Objective, Score
from minitransformer.training.objectives.causal import Causal
from minitransformer.training.objectives.classify import Classify
from minitransformer.training.objectives.instruct import Instruct
from minitransformer.training.objectives.masked import Masked
from minitransformer.training.objectives.seq2seq import Seq2Seq
from minitransformer.training.objectives.span_corruption import SpanCorruption

__all__ = ["Causal", "Classify", "Instruct", "Masked", "Objective", "Score", "Seq2Seq", "SpanCorruption"]
