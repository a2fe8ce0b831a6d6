"""Rotary positions as configurations spell them: today in `rope_parameters`, formerly in fields of their own."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig

LLAMA3 = {
    "low_freq_factor": "rotary_low_freq_factor",
    "high_freq_factor": "rotary_high_freq_factor",
    "original_max_position_embeddings": "rotary_original_length",
}


def read_rope(hf: dict[str, Any], default_fraction: float = 1.0) -> dict[str, Any]:
    """Our fields, from either spelling; raises `UserError` for a scaling that we do not have."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    base = rope.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base") or 10000.0
    fractions = (rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), hf.get("rotary_pct"))
    fraction = next((value for value in fractions if value is not None), default_fraction)
    ours: dict[str, Any] = {"rotary_base": float(base), "rotary_fraction": float(fraction)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ours
    if kind not in ("linear", "llama3"):
        raise UserError(f"rope_type is {kind!r} in config.json: known are default, linear and llama3")
    ours |= {"rotary_scaling": kind, "rotary_factor": float(rope["factor"])}
    return ours | {name: rope[theirs] for theirs, name in LLAMA3.items() if theirs in rope}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`, and beside it the older spelling for older readers."""
    kind = "default" if config.rotary_scaling == "none" else config.rotary_scaling
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = config.rotary_factor
    if kind == "llama3":
        rope |= {theirs: getattr(config, ours) for theirs, ours in LLAMA3.items()}
    older = {"rope_theta": config.rotary_base, "partial_rotary_factor": config.rotary_fraction}
    return {"rope_parameters": {**rope, **older}, **older, "rope_scaling": None if kind == "default" else rope}
