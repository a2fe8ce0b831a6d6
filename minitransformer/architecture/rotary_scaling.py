"""Rescalings of rotary frequencies, for contexts longer than in training: one class each, registered by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.settings import setting


class RotaryScaling(Registered, kind="rotary scaling"):
    """A rescaling of the frequencies `base`^(−2i/head_dim), in a model with a context of `context_length`."""

    def __init__(self, settings: Any, base: float = 10000.0, context_length: int = 1) -> None:
        self.settings, self.base, self.context_length = settings, base, context_length

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        """The rescaled frequencies, in radians per position."""
        return frequencies

    @property
    def magnitude(self) -> float:
        """The factor of rotated queries and of rotated keys."""
        return 1.0


class NoRotaryScaling(RotaryScaling, name="none"):
    """Unscaled frequencies."""


def factor_setting() -> Any:
    """The setting that scalings share."""
    return setting(1.0, flag="rotary-factor", above=0, help="divisor of the scaled frequencies")


def original_length_setting(at_least: int = 1) -> Any:
    """The setting of scalings that depend on the length of the original training."""
    return setting(
        8192, flag="rotary-original-length", at_least=at_least, help="context length of the original training"
    )


def magnitude_setting() -> Any:
    """The setting of scalings that change the size of queries and keys."""
    return setting(
        None,
        flag="rotary-magnitude",
        above=0,
        help="factor of rotated queries and of rotated keys; None is the one that the paper computes",
    )


class PositionInterpolation(RotaryScaling, name="linear"):
    """Every frequency divided by `factor`. Chen et al. 2023 (arXiv 2306.15595), equation 4."""

    @dataclass(frozen=True)
    class Settings:
        factor: float = factor_setting()

    settings: Settings

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        return frequencies / self.settings.factor


class Llama3Scaling(RotaryScaling, name="llama3"):
    """Low frequencies divided by `factor`, high ones unchanged, with linear interpolation in between.

    A frequency is low below `low_freq_factor` rotations in `original_length` positions, and high from
    `high_freq_factor` rotations. Llama 3 (arXiv 2407.21783), its public code.
    """

    @dataclass(frozen=True)
    class Settings:
        factor: float = factor_setting()
        low_freq_factor: float = setting(
            1.0,
            flag="rotary-low-freq-factor",
            help="rotations within the original length below which a frequency is low",
        )
        high_freq_factor: float = setting(
            4.0,
            flag="rotary-high-freq-factor",
            help="rotations within the original length above which a frequency is high",
        )
        original_length: int = original_length_setting()

    settings: Settings

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        settings = self.settings
        turns = settings.original_length * frequencies / (2 * math.pi)
        low, high = settings.low_freq_factor, settings.high_freq_factor
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - unscaled) * frequencies / settings.factor + unscaled * frequencies


class YaRN(RotaryScaling, name="yarn"):
    """Low frequencies divided by `factor`, high ones unchanged, interpolated between by their place in the spectrum.

    The ramp begins at the pair with `beta_fast` rotations in `original_length` positions, and ends at the one with
    `beta_slow`. Queries and keys are multiplied by 0.1 ln(factor) + 1. Peng et al. 2023 (arXiv 2309.00071),
    sections 3.2 and 3.4; `whole_pairs` as in its public code.
    """

    @dataclass(frozen=True)
    class Settings:
        factor: float = factor_setting()
        beta_fast: float = setting(
            32.0,
            flag="rotary-beta-fast",
            above=0,
            help="rotations within the original length from which a frequency is unchanged",
        )
        beta_slow: float = setting(
            1.0,
            flag="rotary-beta-slow",
            above=0,
            help="rotations within the original length up to which a frequency is divided by the factor",
        )
        original_length: int = original_length_setting()
        magnitude: float | None = magnitude_setting()
        whole_pairs: bool = setting(
            True, flag="rotary-whole-pairs", help="round the limits of YaRN's ramp outwards to whole feature pairs"
        )

    settings: Settings

    @property
    def magnitude(self) -> float:
        if self.settings.magnitude is not None:
            return self.settings.magnitude
        return 0.1 * math.log(max(self.settings.factor, 1.0)) + 1.0

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        half, settings = len(frequencies), self.settings
        first, last = self._pair(settings.beta_fast, half), self._pair(settings.beta_slow, half)
        if settings.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        pairs = torch.arange(half, dtype=torch.float32, device=frequencies.device)
        ramp = ((pairs - first) / (last - first if last != first else 0.001)).clamp(0, 1)
        return ramp * frequencies / settings.factor + (1 - ramp) * frequencies

    def _pair(self, rotations: float, half: int) -> float:
        """The (fractional) feature pair with so many rotations in the original length, of `half` pairs."""
        if self.base == 1.0:
            raise UserError("rotary_base is 1.0, with which all frequencies are one: YaRN needs a greater one")
        return half * math.log(self.settings.original_length / (rotations * 2 * math.pi)) / math.log(self.base)


class DynamicNTK(RotaryScaling, name="dynamic"):
    """Another base, base · s^(d/(d−2)) with s = factor · context_length / original_length − (factor − 1), if s > 1.

    The highest frequency is unchanged, the lowest divided by s. Peng et al. 2023 (arXiv 2309.00071), section
    3.3, for a text of `context_length` tokens. There, the base follows the length of each text, so that a token changes
    what was read before it; here one base serves all texts, and up to `original_length` both agree.
    """

    @dataclass(frozen=True)
    class Settings:
        factor: float = factor_setting()
        original_length: int = original_length_setting()

    settings: Settings

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        factor, half = self.settings.factor, len(frequencies)
        stretch = factor * max(self.context_length / self.settings.original_length, 1.0) - (factor - 1)
        shares = torch.arange(half, dtype=torch.float32, device=frequencies.device) / max(half - 1, 1)
        return frequencies * stretch**-shares


class LongRoPE(RotaryScaling, name="longrope"):
    """Each frequency divided by a factor of its own: `short_factors` up to `original_length`, `long_factors` beyond.

    The length is that of the context. Ding et al. 2024 (arXiv 2402.13753), with the magnitude of Phi-3's public code.
    """

    @dataclass(frozen=True)
    class Settings:
        short_factors: tuple[float, ...] = setting(
            (),
            above=0,
            flag="rotary-short-factors",
            help="divisor of each frequency, in contexts up to the original length",
        )
        long_factors: tuple[float, ...] = setting(
            (), above=0, flag="rotary-long-factors", help="divisor of each frequency, in longer contexts"
        )
        original_length: int = original_length_setting(at_least=2)
        magnitude: float | None = magnitude_setting()

    settings: Settings

    @property
    def magnitude(self) -> float:
        original = self.settings.original_length
        if self.settings.magnitude is not None or self.context_length <= original:
            return self.settings.magnitude or 1.0
        return math.sqrt(1 + math.log(self.context_length / original) / math.log(original))

    def rescale(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        is_long = self.context_length > self.settings.original_length
        factors = self.settings.long_factors if is_long else self.settings.short_factors
        if len(factors) not in (0, len(frequencies)):
            which = "rotary_long_factors" if is_long else "rotary_short_factors"
            raise UserError(
                f"{which} has {len(factors)} numbers: give one for each of {len(frequencies)} pairs, or none"
            )
        return frequencies / torch.tensor(factors, device=frequencies.device) if factors else frequencies
