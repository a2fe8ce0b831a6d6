"""What is asked of a compression: settings with flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from minitransformer.compression import layers, pruning, quantising
from minitransformer.compression.base import Compression
from minitransformer.settings import Choice, check_settings, setting

METHODS = (quantising, pruning, layers)
"""modules of the methods, in the order of `--help`"""

DEFAULT_TOKENS = 1 << 15


@dataclass(frozen=True)
class CompressionConfig:
    """What is made smaller, and the data that decides how."""

    method: Choice[Compression] = Choice(Compression, "int8", help="what is done")
    calibration_tokens: int | None = setting(
        None,
        at_least=1,
        help=f"tokens of training data that a method with calibration reads; None is {DEFAULT_TOKENS:,}",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class CompressionRequest:
    """The settings of a compression, as a part with flags."""

    compression: CompressionConfig = field(default_factory=CompressionConfig)
