"""Rotary settings in public configurations: in `rope_parameters`, or formerly in separate fields."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.settings import flat

LLAMA3 = {
    "low_freq_factor": "rotary_low_freq_factor",
    "high_freq_factor": "rotary_high_freq_factor",
    "original_max_position_embeddings": "rotary_original_length",
}


# By default, GPT-NeoX and StableLM rotate a quarter of each head.
QUARTER = 0.25


def read_rope(hf: dict[str, Any], default_base: float = 10000.0) -> dict[str, Any]:
    """Our fields, from either form, for a family that rotates whole heads.

    Its public code ignores a fraction, or fails. Raises `UserError` for a fraction, and for an unknown scaling.
    """
    ours = read_partial_rope(hf, default_fraction=1.0, default_base=default_base)
    if ours["rotary_fraction"] != 1.0:
        raise UserError(
            f"partial_rotary_factor is {ours['rotary_fraction']} in config.json: {hf.get('model_type', 'this family')} "
            "rotates whole heads, and the transformers library ignores it; remove it, or use the family that has it"
        )
    return ours


def read_partial_rope(
    hf: dict[str, Any], default_fraction: float = QUARTER, default_base: float = 10000.0
) -> dict[str, Any]:
    """Our fields, from either form, for a family that rotates a fraction of each head."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    base = rope.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base") or default_base
    fractions = (rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), hf.get("rotary_pct"))
    fraction = next((value for value in fractions if value is not None), default_fraction)
    ours: dict[str, Any] = {"rotary_base": float(base), "rotary_fraction": float(fraction)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ours
    if kind not in ("linear", "llama3"):
        raise UserError(f"rope_type is {kind!r} in config.json: known are default, linear and llama3")
    ours |= {"rotary_scaling": kind, "rotary_factor": float(rope["factor"])}
    original = {"original_max_position_embeddings": hf.get("max_position_embeddings")} if kind == "llama3" else {}
    said = {**original, **rope}
    return ours | {name: said[theirs] for theirs, name in LLAMA3.items() if said.get(theirs) is not None}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`, and the older fields for older readers.

    For a family that rotates whole heads, without a fraction.
    """
    rotary = config.positions.settings
    kind = "default" if rotary.scaling.name == "none" else rotary.scaling.name
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rotary.base}
    if kind != "default":
        rope["factor"] = rotary.scaling.settings.factor
    if kind == "llama3":
        rope |= {theirs: flat(config)[ours] for theirs, ours in LLAMA3.items()}
    older = {"rope_theta": rotary.base, "rope_scaling": None if kind == "default" else rope}
    return {"rope_parameters": rope, **older}


def write_partial_rope(config: ModelConfig) -> dict[str, Any]:
    """`write_rope` with the rotated fraction of each head, for a family that has it."""
    fraction = {"partial_rotary_factor": config.positions.settings.fraction}
    written = {**write_rope(config), **fraction}
    # Readers may use either one, so both are complete.
    return {name: {**value, **fraction} if isinstance(value, dict) else value for name, value in written.items()}
