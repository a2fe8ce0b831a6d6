"""Decoding and prefill of ours and of peers. Importing this imports torch.

All sample from the full distribution at temperature 1, so that the work per token is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitransformer.benchmark.case import BenchSetting
from minitransformer.benchmark.ours import model_of
from minitransformer.benchmark.peers import transformers_model
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fast.rows import with_row_kernel
from minitransformer.generation.prefill import PromptPrefill
from minitransformer.generation.weights import StoredWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Once = Callable[[], object]


def ours_decode(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """`generate`, as `sample.py` calls it."""
    model = _ours(setting, precision)
    sampling = SamplingConfig(num_samples=batch, max_new_tokens=tokens, temperature=1.0, top_k=None, seed=setting.seed)
    prompt = [0] * setting.prompt

    def once() -> None:
        for _ in generate(model, prompt, sampling):
            pass

    return once


def nanogpt_decode(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """Its `generate`, which has no cache."""
    model = _nanogpt(setting, precision)
    prompt = _prompt(setting, setting.prompt, batch)
    return lambda: model.generate(prompt, tokens)


def transformers_decode(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """Its `generate`, with its cache."""
    model = _transformers(setting, precision)
    prompt = _prompt(setting, setting.prompt, batch)
    mask = torch.ones_like(prompt)

    @torch.inference_mode()
    def once() -> Tensor:
        return model.generate(
            prompt, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens
        )

    return once


def ours_prefill(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """A prompt into a new cache."""
    model = _ours(setting, precision)
    return _reading(
        lambda prompt: PromptPrefill(model, prompt.tolist()).advance(prompt.numel()), setting, tokens, batch
    )


def nanogpt_prefill(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """A forward pass, which computes the last logits only; there is no cache to fill."""
    return _reading(_nanogpt(setting, precision), setting, tokens, batch)


def transformers_prefill(setting: BenchSetting, precision: str, tokens: int, batch: int) -> Once:
    """A forward pass that fills its cache and computes the last logits only."""
    read = partial(_transformers(setting, precision), use_cache=True, logits_to_keep=1)
    return _reading(read, setting, tokens, batch)


def _reading(read: Callable[[Tensor], object], setting: BenchSetting, tokens: int, batch: int) -> Once:
    prompt = _prompt(setting, tokens, batch)

    @torch.inference_mode()
    def once() -> object:
        return read(prompt)

    return once


def _ours(setting: BenchSetting, precision: str) -> Any:
    return with_row_kernel(StoredWeights.named(precision).applied(model_of(setting).eval()))


def _nanogpt(setting: BenchSetting, precision: str) -> Any:
    assert setting.against is not None
    torch.manual_seed(setting.seed)
    return setting.against.model(setting.shape, setting.device).to(DTYPES[precision]).eval()


def _transformers(setting: BenchSetting, precision: str) -> Any:
    torch.manual_seed(setting.seed)
    return transformers_model(setting.shape, setting.device).to(DTYPES[precision]).eval()


def _prompt(setting: BenchSetting, length: int, batch: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long, device=setting.device)
