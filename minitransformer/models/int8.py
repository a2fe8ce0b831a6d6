"""Matrices of 8-bit integers, with a scale for each row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from minitransformer.models.stored import StoredLinear


def quantise_rows(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out"]]:
    """Each weight as a multiple of its row's scale, max |w| / 127, to which it is rounded; and the scales.

    The error is at most half the scale. Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339), section 2.1, for weights
    alone.
    """
    scale = weight.abs().amax(-1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantise_rows(stored: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]) -> Float[Tensor, "out in"]:
    """The matrix that `quantise_rows` has rounded to."""
    return stored.to(scale.dtype).mul_(scale[:, None])


class Int8Linear(StoredLinear):
    """A linear map with a matrix in 8 bits, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        stored = torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device)
        super().__init__(linear, stored, linear.weight.new_empty(linear.out_features))

    def quantise(self, matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        return quantise_rows(matrix)

    @staticmethod
    def dequantise(weight: Tensor, scale: Tensor, features: int) -> Float[Tensor, "out in"]:
        return dequantise_rows(weight, scale)
