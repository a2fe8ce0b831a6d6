"""Rotary positions and sliding windows in the metadata of GGUF files."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.rope import HF, factors_of
from minitransformer.settings import flat, with_settings

EACH, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
DIVISORS = (EACH, SHORT, LONG)
"""tensors with a divisor of each frequency, which stand among the metadata: of all texts, of LongRoPE's two lengths"""
SCALING = "rope.scaling."
KINDS = ("linear", "yarn")
"""what llama.cpp rescales by in every architecture with rotary positions"""


def read_rotary(metadata: HF) -> dict[str, Any]:
    """The width of heads, and their rotation."""
    width = metadata.get("attention.key_length") or metadata["embedding_length"] // metadata["attention.head_count"]
    turned = metadata.get("rope.dimension_count") or width
    return {
        "head_dim": width,
        "rotary_base": float(metadata.get("rope.freq_base", 10000.0)),
        "rotary_fraction": turned / width,
        **_read_scaling(metadata),
    }


def write_rotary(config: ModelConfig, divisors: Container[str]) -> HF:
    """The inverse of `read_rotary`, where llama.cpp reads the tensors `divisors` of this architecture."""
    width, rotary = config.features_per_head, config.positions.settings
    return {
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * rotary.fraction),
        "rope.freq_base": rotary.base,
        **_write_scaling(config, divisors),
    }


def in_factors(config: ModelConfig) -> ModelConfig:
    """`config` with the divisors of Llama 3's frequencies, which are all that a file says of them, as LongRoPE's."""
    if config.positions.name != "rotary" or config.positions.settings.scaling.name != "llama3":
        return config
    rotary = config.positions.settings
    turned = int(config.features_per_head * rotary.fraction)
    frequencies = rotary.base ** (-torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    divisors = tuple((frequencies / rotary.scaling.make(rotary.base).rescale(frequencies)).tolist())
    names = ("rotary_short_factors", "rotary_long_factors")
    return with_settings(
        config, {"rotary_scaling": "longrope", "rotary_magnitude": 1.0, **dict.fromkeys(names, divisors)}
    )


def _read_scaling(metadata: HF) -> dict[str, Any]:
    """The rescaling; raises `UserError` for one that is not known."""
    kind, factor = metadata.get(SCALING + "type", "linear"), metadata.get(SCALING + "factor")
    factor = float(factor or metadata.get("rope.scale_linear") or 1.0)
    magnitude = float(metadata.get(SCALING + "attn_factor", 1.0))
    original = {"rotary_original_length": metadata.get(SCALING + "original_context_length", metadata["context_length"])}
    divisors = {name: metadata.get(name, metadata.get(EACH, ())) for name in (SHORT, LONG)}
    if any(divisors.values()) and factor == 1.0:
        named = {"rotary_short_factors": divisors[SHORT], "rotary_long_factors": divisors[LONG]}
        return {"rotary_scaling": "longrope", "rotary_magnitude": magnitude, **original, **named}
    if kind == "yarn" and not any(divisors.values()):
        said = {name: metadata.get(f"{SCALING}yarn_{name}") for name in ("beta_fast", "beta_slow", "attn_factor")}
        size = said.pop("attn_factor") or magnitude * _yarn_magnitude(factor)
        limits = {f"rotary_{name}": float(value) for name, value in said.items() if value is not None}
        return {"rotary_scaling": "yarn", "rotary_factor": factor, "rotary_magnitude": size, **original, **limits}
    if kind not in ("none", "linear") or any(divisors.values()) or magnitude != 1.0:
        raise UserError(
            f"{SCALING}type is {kind!r} in the metadata, in a way that is not known: "
            "import the checkpoint that the file was made from"
        )
    return {} if kind == "none" or factor == 1.0 else {"rotary_scaling": "linear", "rotary_factor": factor}


def _write_scaling(config: ModelConfig, divisors: Container[str]) -> HF:
    """The inverse of `_read_scaling`, for rescalings that llama.cpp knows; empty for others."""
    rotary, ours = config.positions.settings, flat(config)
    kind, magnitude = rotary.scaling.name, rotary.scaling.make(rotary.base, config.context_length).magnitude
    written: HF = {}
    if kind in KINDS:
        written = {SCALING + "type": kind, SCALING + "factor": ours["rotary_factor"]}
        magnitude /= _yarn_magnitude(ours["rotary_factor"]) if kind == "yarn" else 1.0
    elif kind == "longrope" and SHORT in divisors:
        short, long = factors_of(config).values()
        one = short == long and EACH in divisors
        written = {EACH: short} if one else {SCALING + "type": kind, SHORT: short, LONG: long}
    if kind != "linear" and written:
        written[SCALING + "original_context_length"] = ours["rotary_original_length"]
        written |= {} if math.isclose(magnitude, 1.0) else {SCALING + "attn_factor": magnitude}
    return written


def _yarn_magnitude(factor: float) -> float:
    """What llama.cpp multiplies queries and keys by under YaRN, before the factor that a file may say."""
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


def read_gguf_windows(metadata: HF, every: int) -> dict[str, Any]:
    """The window and its layers: by default, all but every so manieth."""
    window = metadata.get("attention.sliding_window")
    if not window:
        return {"attention_window": None}
    pattern = metadata.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern > 0 for layer in range(metadata["block_count"])]
    return {"attention_window": window, "window_pattern": tuple(map(bool, pattern))}


def write_gguf_windows(config: ModelConfig) -> HF:
    """The inverse of `read_gguf_windows`."""
    windows = [config.window_of(layer) is not None for layer in range(config.num_layers)]
    written = {
        "attention.sliding_window": config.attention_window,
        "attention.sliding_window_pattern": windows,
    }
    return written if any(windows) else {}
