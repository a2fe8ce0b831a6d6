"""Rotary settings in public configurations: in `rope_parameters`, or formerly in separate fields."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.settings import flat

HF = dict[str, Any]
ORIGINAL = "original_max_position_embeddings"
# For each rope_type, the fields beside rope_theta, and ours.
SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rotary_factor"},
    "dynamic": {"factor": "rotary_factor"},
    "llama3": {
        "factor": "rotary_factor",
        "low_freq_factor": "rotary_low_freq_factor",
        "high_freq_factor": "rotary_high_freq_factor",
        ORIGINAL: "rotary_original_length",
    },
    "yarn": {
        "factor": "rotary_factor",
        "beta_fast": "rotary_beta_fast",
        "beta_slow": "rotary_beta_slow",
        "attention_factor": "rotary_magnitude",
        "truncate": "rotary_whole_pairs",
        ORIGINAL: "rotary_original_length",
    },
    "longrope": {
        "short_factor": "rotary_short_factors",
        "long_factor": "rotary_long_factors",
        "attention_factor": "rotary_magnitude",
        ORIGINAL: "rotary_original_length",
    },
}
FACTORS = ("short_factor", "long_factor")
# By default, GPT-NeoX and StableLM rotate a quarter of each head.
QUARTER = 0.25


def read_rope(hf: HF, default_base: float = 10000.0) -> dict[str, Any]:
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


def read_partial_rope(hf: HF, default_fraction: float = QUARTER, default_base: float = 10000.0) -> dict[str, Any]:
    """Our fields, from either form, for a family that rotates a fraction of each head."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    base = rope.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base") or default_base
    fractions = (rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), hf.get("rotary_pct"))
    fraction = next((value for value in fractions if value is not None), default_fraction)
    ours: dict[str, Any] = {"rotary_base": float(base), "rotary_fraction": float(fraction)}
    return ours | _read_scaling(rope, hf)


def read_window_rope(hf: HF, default_base: float, default_window_base: float | None = None) -> dict[str, Any]:
    """`read_rope` for a family whose layers with a sliding window have a base of their own, and unscaled frequencies.

    By default, it is that of the other layers. Raises `UserError` for another scaling in these layers.
    """
    rope = hf.get("rope_parameters") or {}
    if rope and not rope.keys() & {"full_attention", "sliding_attention"}:
        raise UserError("rope_parameters in config.json has no full_attention: add one, with rope_type and rope_theta")
    full = {**(rope.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    full.pop("truncate", None)  # which the transformers library does not look for here
    ours = read_rope({**hf, "rope_parameters": full, "rope_scaling": None}, default_base)
    window = rope.get("sliding_attention") or {}
    base = window.get("rope_theta") or hf.get("rope_local_base_freq") or default_window_base or ours["rotary_base"]
    if window.get("rope_type", "default") == "default":
        return {**ours, "rotary_window_base": float(base)}
    if read_rope({**hf, "rope_parameters": window, "rope_scaling": None}, default_base) != ours:
        raise UserError(
            f"rope_type is {window['rope_type']!r} for sliding_attention in config.json: these layers can only be "
            "unscaled, or as all others"
        )
    return ours


def _read_scaling(rope: HF, hf: HF) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    if kind not in SCALINGS:
        raise UserError(f"rope_type is {kind!r} in config.json: known are {', '.join(SCALINGS)}")
    length = hf.get("max_position_embeddings")
    original = hf.get(ORIGINAL) or rope.get(ORIGINAL) or length
    said = {**rope, ORIGINAL: original}
    if kind == "yarn":
        said |= _yarn(said, length)
    if kind in ("linear", "dynamic", "llama3"):
        said["factor"] = float(rope["factor"])
    ours = {name: said[theirs] for theirs, name in SCALINGS[kind].items() if said.get(theirs) is not None}
    if kind == "dynamic":  # the frequencies of longer texts are those of no fixed context
        ours["rotary_original_length"] = length
    if kind == "longrope":
        ours |= _long_rope(said, length)
    return {"rotary_scaling": kind, **ours}


def _yarn(rope: HF, length: Any) -> HF:
    """Factor and attention factor, which may be left to what other fields say."""
    factor = float(rope.get("factor") or length / rope[ORIGINAL])
    scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
    said: HF = {"factor": factor}
    if rope.get("attention_factor") is None and all(scales):
        above, below = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales)  # type: ignore[operator]
        said["attention_factor"] = above / below
    return said


def _long_rope(rope: HF, length: Any) -> dict[str, Any]:
    """The context up to which the short factors serve, as both cannot, and the factor of queries and keys."""
    original = rope[ORIGINAL]
    ours: dict[str, Any] = {SCALINGS["longrope"][name]: tuple(map(float, rope[name])) for name in FACTORS}
    if rope.get("attention_factor") is None:
        factor = float(rope.get("factor") or length / original)
        ours["rotary_magnitude"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**ours, "context_length": min(length, original)}


def factors_of(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """The factors of LongRoPE by our names, 1 where the model has none."""
    pairs = int(config.features_per_head * config.positions.settings.fraction) // 2
    values, names = flat(config), [SCALINGS["longrope"][theirs] for theirs in FACTORS]
    return {name: values[name] or (1.0,) * pairs for name in names if name in values}


def write_rope(config: ModelConfig, kinds: Container[str] = SCALINGS) -> HF:
    """`rope_parameters`, and the older fields for older readers.

    For a family that rotates whole heads, without a fraction, and knows the scalings `kinds`.
    """
    rotary, ours = config.positions.settings, flat(config)
    kind = rotary.scaling.name if rotary.scaling.name in kinds else "default"
    rope: HF = {"rope_type": kind, "rope_theta": rotary.base}
    rope |= {theirs: ours[name] for theirs, name in SCALINGS[kind].items() if ours[name] is not None}
    if kind == "longrope":  # by default, the library computes it from a longer context
        rope["attention_factor"] = rotary.scaling.make(rotary.base, config.context_length).magnitude
        rope |= {theirs: factors_of(config)[SCALINGS[kind][theirs]] for theirs in FACTORS}
    older = {"rope_theta": rotary.base, "rope_scaling": None if kind == "default" else rope}
    return {"rope_parameters": rope, **older}


def write_window_rope(config: ModelConfig) -> HF:
    """`write_rope` with the base of layers with a sliding window, for a family that has one."""
    written = write_rope(config)
    full = written["rope_parameters"]
    windows = any(config.window_of(layer) for layer in range(config.num_layers))
    base = config.positions.settings.window_base if windows else None
    window = full if base is None else {"rope_type": "default", "rope_theta": base}
    return {**written, "rope_parameters": {"full_attention": full, "sliding_attention": window}}


def write_partial_rope(config: ModelConfig, kinds: Container[str] = SCALINGS) -> HF:
    """`write_rope` with the rotated fraction of each head, for a family that has it."""
    fraction = {"partial_rotary_factor": config.positions.settings.fraction}
    written = {**write_rope(config, kinds), **fraction}
    # Readers may use either one, so both are complete.
    return {name: {**value, **fraction} if isinstance(value, dict) else value for name, value in written.items()}
