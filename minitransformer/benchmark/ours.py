"""Our models in the shapes of the benchmark. Importing this imports torch."""

from __future__ import annotations

import numpy as np
import torch

from minitransformer.benchmark.case import BenchSetting, Cost
from minitransformer.benchmark.shape import Shape
from minitransformer.benchmark.workers import peak_megabytes
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model

WIDTHS = {"fp32": 4, "bf16": 2, "int8": 1}
"""bytes per weight"""


def config_of(shape: Shape) -> ModelConfig:
    """GPT-2's architecture in this shape, as for all contestants."""
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
    """Random token ids to train on [tokens]; the cost of a step does not depend on them."""
    generator = np.random.default_rng(setting.seed)
    return generator.integers(setting.shape.vocab_size, size=windows * setting.shape.context_length, dtype=np.uint32)


def training_cost(shape: Shape, precision: str) -> Cost:
    """The FLOPs of a training step per token, as in PaLM's appendix B."""
    return Cost(_unmade(shape).flops_per_token(shape.context_length), 0.0, precision)


def reading_cost(shape: Shape, weights: str, products: str, length: int) -> Cost:
    """The cost of prefill per token of a prompt of `length`: a third of a training step, and a share of the weights."""
    model = _unmade(shape)
    # Without the head, which is applied to the last token only.
    head = shape.vocab_size * shape.d_model
    flops = model.flops_per_token(length) / 3 - 2 * head * (1 - 1 / length)
    return Cost(flops, _weight_bytes(model, weights) / length, products)


def decoding_cost(shape: Shape, weights: str, products: str, cache: str, length: int, batch: int) -> Cost:
    """The cost of decoding per token, in a batch of `batch` sequences of up to `length` tokens.

    Each step reads all weights once per batch, and on average half of each sequence's final KV cache; operations are a
    third of a training step's. Weights, products and cache each have their precision.
    """
    model = _unmade(shape)
    cached = 2 * shape.num_layers * shape.d_model * (length / 2) * WIDTHS[cache]
    return Cost(model.flops_per_token(length // 2) / 3, _weight_bytes(model, weights) / batch + cached, products)


def _unmade(shape: Shape) -> Model:
    """The model without allocated weights."""
    with torch.device("meta"):
        return build_model(config_of(shape))


def _weight_bytes(model: Model, precision: str) -> float:
    """Bytes of the weights that every step reads: matrices and the head, but not whole embeddings."""
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return matrices * WIDTHS[precision]


def synchronise(device: str) -> None:
    """Wait for all work on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()


def peak_on(device: str) -> float:
    """Peak memory in MB: of torch on a GPU, or of the process on a CPU."""
    synchronise(device)
    return torch.cuda.max_memory_allocated() / 1e6 if device.startswith("cuda") else peak_megabytes()
