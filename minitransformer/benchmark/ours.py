"""Our own models in the shapes of the benchmark. Importing this imports torch."""

from __future__ import annotations

import numpy as np
import torch

from minitransformer.benchmark.case import BenchSetting, Cost
from minitransformer.benchmark.shape import Shape
from minitransformer.benchmark.workers import peak_megabytes
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model

WIDTHS = {"fp32": 4, "bf16": 2, "int8": 1}
"""bytes of a weight"""


def config_of(shape: Shape) -> ModelConfig:
    """GPT-2's architecture, as all contestants have it, in this shape."""
    return ModelConfig(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        d_model=shape.d_model,
        context_length=shape.context_length,
        vocab_size=shape.vocab_size,
        dropout=shape.dropout,
        bias=shape.bias,
        positions="learned",
        feedforward="gelu",
    )


def model_of(setting: BenchSetting) -> Model:
    """Our model of the shape, untrained, on the device."""
    torch.manual_seed(setting.seed)
    return build_model(config_of(setting.shape)).to(setting.device)


def training_tokens(setting: BenchSetting, windows: int = 2000) -> np.ndarray:
    """Token ids to train on [tokens]: what a step costs does not depend on what they are."""
    generator = np.random.default_rng(setting.seed)
    return generator.integers(setting.shape.vocab_size, size=windows * setting.shape.context_length, dtype=np.uint32)


def training_cost(shape: Shape, precision: str) -> Cost:
    """Of a token that is trained on: the arithmetic of its step, as PaLM's appendix B counts it."""
    return Cost(_unmade(shape).flops_per_token(shape.context_length), 0.0, precision)


def reading_cost(shape: Shape, weights: str, products: str, length: int) -> Cost:
    """Of a token of a prompt of `length` tokens: a third of a training step, and its share of the weights."""
    model = _unmade(shape)
    # Without the head, which reads the last token only.
    head = shape.vocab_size * shape.d_model
    flops = model.flops_per_token(length) / 3 - 2 * head * (1 - 1 / length)
    return Cost(flops, _weight_bytes(model, weights) / length, products)


def decoding_cost(shape: Shape, weights: str, products: str, cache: str, length: int, batch: int) -> Cost:
    """Of a token that is written, as one of `batch` samples, into texts of up to `length` tokens.

    Each step reads all weights once for the whole batch, and of each sample's keys and values half of what they are at
    the end; operations are a third of a training step's. Weights, products and cache have each their precision.
    """
    model = _unmade(shape)
    cached = 2 * shape.num_layers * shape.d_model * (length / 2) * WIDTHS[cache]
    return Cost(model.flops_per_token(length // 2) / 3, _weight_bytes(model, weights) / batch + cached, products)


def _unmade(shape: Shape) -> Model:
    """The model, whose weights have a shape alone."""
    with torch.device("meta"):
        return build_model(config_of(shape))


def _weight_bytes(model: Model, precision: str) -> float:
    """Of the weights that every step reads: matrices, and the head; of other embeddings it reads a row."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return matrices * WIDTHS[precision]


def synchronise(device: str) -> None:
    """Wait until `device` has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()


def peak_on(device: str) -> float:
    """MB: the most that torch has taken of a GPU, or on a CPU, that the process has had."""
    synchronise(device)
    return torch.cuda.max_memory_allocated() / 1e6 if device.startswith("cuda") else peak_megabytes()
