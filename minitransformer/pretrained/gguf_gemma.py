"""Gemma 1, 2 and 3 in GGUF files."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import HF, Field
from minitransformer.pretrained.gguf_families import (
    BLOCK,
    BY_TABLE,
    FEEDFORWARD,
    NORMED_HEADS,
    OUTSIDE,
    PRE_LN,
    RMS,
    ROTARY,
    THEIRS,
    RotaryGGUF,
    attention_tensors,
)
from minitransformer.pretrained.gguf_rope import SCALING, read_gguf_windows, write_gguf_windows
from minitransformer.pretrained.rules import Rule, Transform


class OnePlus(Transform):
    """A norm weight w is stored as 1 + w: Gemma."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor - 1,)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0] + 1


def one_plus(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules, with norms as Gemma has them."""
    return tuple(Rule(rule.source, rule.target, OnePlus()) if "norm" in rule.source else rule for rule in rules)


class GemmaGGUF(RotaryGGUF, name="gemma"):
    """Gemma 1."""

    architectures = {"decoder": "gemma"}
    tolerance = BY_TABLE
    fixed = {
        **ROTARY,
        "norm": "rms-zero-centred",
        "scaled_embeddings": True,
        "tied_embeddings": True,
        "feedforward": "geglu-tanh",
    }
    rules = (*one_plus((*OUTSIDE, *PRE_LN)), *attention_tensors(), *FEEDFORWARD)


class Gemma2GGUF(RotaryGGUF, name="gemma2"):
    """Gemma 2, in which every other layer has a window."""

    architectures = {"decoder": "gemma2"}
    tolerance = BY_TABLE
    fields = {
        **RMS,
        "attn_logit_softcapping": Field("attention_softcap", default=50.0),
        "final_logit_softcapping": Field("logit_softcap", default=30.0),
        "attention.sliding_window": Field("attention_window", default=4096),
    }
    fixed = {**GemmaGGUF.fixed, "residual": "sandwich"}
    rules = (
        *GemmaGGUF.rules,
        *one_plus(
            (
                Rule(THEIRS + "post_attention_norm", BLOCK + "attention_residual.output_norm"),
                Rule(THEIRS + "post_ffw_norm", BLOCK + "feedforward_residual.output_norm"),
            )
        ),
    )
    every: ClassVar[int] = 2
    """by default, all but every so manieth layer has a window"""
    layers_of_largest: ClassVar[int] = 46
    """the number of layers by which llama.cpp knows the member whose scores are scaled by d_model / num_heads"""

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        ours = super().read(hf)
        is_largest = hf["block_count"] == cls.layers_of_largest
        width = hf["embedding_length"] // hf["attention.head_count"] if is_largest else ours["head_dim"]
        return {**ours, **read_gguf_windows(hf, cls.every), "attention_scale": width**-0.5}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), **write_gguf_windows(config)}


class Gemma3GGUF(Gemma2GGUF, name="gemma3"):
    """Gemma 3, with norms of each head's queries and keys, and another base of rotation in windows."""

    architectures = {"decoder": "gemma3"}
    fields = {**RMS, "final_logit_softcapping": "logit_softcap"}
    fixed = {**Gemma2GGUF.fixed, "qk_norm": "head"}
    rules = (*Gemma2GGUF.rules, *one_plus(NORMED_HEADS))
    every = 6
    layers_of_largest = 62

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        ours = super().read(hf)
        base = float(hf.get("rope.freq_base_swa", 10000.0))
        return {**ours, "rotary_window_base": base if ours["attention_window"] else None}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        rotary, written = config.positions.settings, super().write(config)
        written.pop(SCALING + "attn_factor", None)  # which llama.cpp would apply in windows too
        return {**written, "rope.freq_base_swa": rotary.window_base or rotary.base}
