"""A variant of every family that a file outside the package may add to."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.feedforward import PlainFeedForward
from minitransformer.architecture.init import GPT2
from minitransformer.architecture.norms import RMSNorm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.evaluation.items import Totals
from minitransformer.evaluation.metrics import Metric
from minitransformer.lab.experiment import Experiment, Findings
from minitransformer.pretrained.gpt import GPT2Family
from minitransformer.settings import setting
from minitransformer.text.tokenizers import Bytes, Tokenizer
from minitransformer.training.objectives.base import Score
from minitransformer.training.objectives.causal import Causal
from minitransformer.training.optimizers import AdamW
from minitransformer.training.schedules import Schedule


class Mish(PlainFeedForward, name="mish"):
    """x tanh(log(1 + eˣ)). Misra 2019 (arXiv 1908.08681), equation 1."""

    activation = staticmethod(F.mish)


class PNorm(RMSNorm, name="p-norm"):
    """`RMSNorm` after a learned power of two of each feature."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Reversed(PositionScheme, name="last-first"):
    """The features of every second token in reverse."""

    @dataclass(frozen=True)
    class Settings:
        every: int = setting(2, at_least=1, help="one token in so many is reversed")

    def __init__(self, settings: Settings, space: object) -> None:
        super().__init__(settings, space)
        self.every = settings.every

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.where((positions % self.every == 0)[..., None], x.flip(-1), x)


class Half(GPT2, name="gpt2-half"):
    """GPT-2's weights, half as large."""

    def linear(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.01)


class Lion(AdamW, name="adamw-without-decay"):
    """AdamW in which nothing decays."""

    def build(self, weights: object) -> list:
        optimizers = super().build(weights)
        for group in optimizers[0].param_groups:
            group["weight_decay"] = 0.0
        return optimizers


class Power(Schedule, name="power"):
    """(1 − progress)ᵖ."""

    @dataclass(frozen=True)
    class Settings:
        exponent: float = setting(2.0, above=0, help="p")

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return (1 - progress) ** self.settings.exponent


class Tempered(Causal, name="causal-tempered"):
    """`Causal`, scaled."""

    @dataclass(frozen=True)
    class Settings:
        scale: float = setting(1.0, above=0, help="factor of the loss")

    def loss_sum(self, model: nn.Module, batch: object) -> Tensor:
        return self.settings.scale * super().loss_sum(model, batch)

    def score(self, model: nn.Module, batch: object) -> Score:
        return Score(self.settings.scale * super().score(model, batch).nats)


class TokensPerTarget(Metric, name="tokens_per_target"):
    """Tokens that were read for each target."""

    label = title = "tokens per target"
    in_words = "{:.2f} tokens per target"

    @staticmethod
    def value(totals: Totals) -> float:
        return totals.tokens / totals.targets


class Shifted(Tokenizer, name="bytes-shifted"):
    """The bytes of UTF-8, with ids that are `by` further on."""

    @dataclass(frozen=True)
    class Settings:
        by: int = setting(1, at_least=0, at_most=255, help="how far the ids are shifted")

    def __init__(self, by: int, special_tokens: dict[str, int] | None = None) -> None:
        super().__init__([bytes([(i - by) % 256]) for i in range(256)], special_tokens)
        self.by = by

    @classmethod
    def fit(cls, settings: Settings, texts: object, vocab_size: int | None = None) -> "Shifted":
        return cls(settings.by).check_vocab_size(vocab_size)

    @classmethod
    def usual_vocab_size(cls, settings: Settings) -> int:
        return 256 + 1

    def encode_array(self, text: str) -> np.ndarray:
        return (Bytes().encode_array(text) + self.by) % 256

    def to_json(self) -> dict:
        return self._described(by=self.by)

    @classmethod
    def _from_json(cls, content: dict) -> "Shifted":
        return cls(content["by"], content["special_tokens"])


class Sixth(Experiment, name="mine"):
    """An experiment without tasks."""

    title, question, source, minutes = "Mine", "Does a plugin add an experiment?", "none", 0.1

    def tasks(self) -> list:
        return []

    def conclude(self, results: object) -> Findings:
        return Findings([])


class Cousin(GPT2Family, name="gpt2-cousin"):
    """GPT-2 under another model_type."""
