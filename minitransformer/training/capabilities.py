"""Which precisions a device supports in hardware. Nothing is timed, so the answer is deterministic."""

from __future__ import annotations

import torch

# Compute capabilities of the first NVIDIA GPUs with matrix units for the type: Volta and Ampere.
FIRST_WITH_FLOAT16, FIRST_WITH_BFLOAT16 = (7, 0), (8, 0)


def fastest_precision(device: torch.device) -> tuple[str, str]:
    """The fastest precision in the hardware of `device`, and why, in words."""
    if device.type == "cuda":
        if _capability(device) >= FIRST_WITH_BFLOAT16:
            return "bf16", "this GPU supports it"
        if _capability(device) >= FIRST_WITH_FLOAT16:
            return "fp16", "this GPU supports it, but not bf16"
        return "fp32", "this GPU supports no lower precision"
    if device.type == "cpu":
        units = cpu_bfloat16_units()
        return ("bf16", f"this processor has {units}") if units else ("fp32", "this processor has no bf16 units")
    return "fp32", f"bf16 gains nothing on {device.type}"


def why_not_fast(device: torch.device, precision: str) -> str | None:
    """Why `device` can only emulate `precision`, or not use it at all; None if its hardware supports it."""
    what = "GPU" if device.type == "cuda" else "machine"
    missing = f"this {what} has no {precision} units"
    if precision == "fp32":
        return None
    if device.type == "cuda":
        first = {"fp16": FIRST_WITH_FLOAT16, "bf16": FIRST_WITH_BFLOAT16}.get(precision)
        return None if first is None or _capability(device) >= first else missing
    return None if device.type == "cpu" and precision == "bf16" and cpu_bfloat16_units() else missing


def cpu_bfloat16_units() -> str | None:
    """The instruction set for bfloat16 matrix products on this CPU; None if there is none that torch uses."""
    if not torch.backends.mkldnn.is_available():
        return None
    for name, is_supported in (("AMX-BF16", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")):
        # These are private in some versions of torch.
        if getattr(torch.cpu, is_supported, lambda: False)():
            return name
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
