"""The subjects of the benchmark; `Subject.registry` has them all."""

from minitransformer.benchmark.case import Subject
from minitransformer.benchmark.subjects import decoding, startup, time_to_loss, tokenizers, training

__all__ = ["Subject", "decoding", "startup", "time_to_loss", "tokenizers", "training"]
