"""Which arithmetic a processor has units for. Nothing here is timed: the same processor always gets the same answer."""

from __future__ import annotations

import torch

# Compute capabilities of the first NVIDIA GPUs with matrix units for the type: Volta and Ampere.
FIRST_WITH_FLOAT16, FIRST_WITH_BFLOAT16 = (7, 0), (8, 0)


def fastest_precision(device: torch.device) -> tuple[str, str]:
    """The precision that `device` is built to multiply fastest, and by what, in words."""
    if device.type == "cuda":
        if _capability(device) >= FIRST_WITH_BFLOAT16:
            return "bf16", "this GPU has units for it"
        if _capability(device) >= FIRST_WITH_FLOAT16:
            return "fp16", "this GPU has units for it, and none for bf16"
        return "fp32", "this GPU has units for nothing smaller"
    if device.type == "cpu":
        units = cpu_bfloat16_units()
        return ("bf16", f"this processor has {units}") if units else ("fp32", "this processor has no bf16 units")
    return "fp32", f"bf16 gains nothing on {device.type}"


def why_not_fast(device: torch.device, precision: str) -> str | None:
    """Why `device` would compute in `precision` only by detours, or not at all, in words; None if it has the units."""
    what = "GPU" if device.type == "cuda" else "machine"
    missing = f"this {what} has no {precision} units"
    if precision == "fp32":
        return None
    if device.type == "cuda":
        first = {"fp16": FIRST_WITH_FLOAT16, "bf16": FIRST_WITH_BFLOAT16}.get(precision)
        return None if first is None or _capability(device) >= first else missing
    return None if device.type == "cpu" and precision == "bf16" and cpu_bfloat16_units() else missing


def cpu_bfloat16_units() -> str | None:
    """The instructions by which this CPU multiplies bfloat16 matrices; None if it has none that torch uses."""
    if not torch.backends.mkldnn.is_available():
        return None
    for name, is_supported in (("AMX-BF16", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")):
        # torch has no public name for these in all of its versions.
        if getattr(torch.cpu, is_supported, lambda: False)():
            return name
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
