"""Matrices of 4-bit integers, with a scale for each group of neighbouring weights of a row."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from minitransformer.models.stored import StoredLinear

BLOCK = 64
"""weights that are stored together"""
LARGEST = 7
"""of the integers, which are -7 to 7"""


def pack(integers: Int8[Tensor, "out in"]) -> UInt8[Tensor, "out half"]:
    """Two integers from -8 to 7 in each byte, where the row product reads them: `in` is a multiple of `BLOCK`.

    A block is 8 little-endian words of 32 bits. The k-th lowest 4 bits of word j are integer 8 k + j of the block, so
    that a shift of all words gives 8 neighbours.
    """
    low, high = integers.view(len(integers), -1, 4, 2, 8).unbind(3)  # [out, blocks, 4 bytes, 8 words]
    return ((low & 15) | (high << 4)).transpose(2, 3).flatten(1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, "out half"]) -> Int8[Tensor, "out in"]:
    """The inverse of `pack`."""
    both = packed.to(torch.int8).view(len(packed), packed.size(1) // (BLOCK // 2), 8, 4).transpose(2, 3)
    low, high = (both << 4) >> 4, both >> 4  # shifts to the right keep the sign
    return torch.stack([low, high], dim=3).flatten(1)


def group_scale(weight: Float[Tensor, "*rows group"]) -> Float[Tensor, "*rows"]:
    """max |w| / 7 of each group: that of Dettmers et al. (arXiv 2208.07339), equation 1, for 4 bits."""
    return weight.abs().amax(-1).clamp(min=torch.finfo(weight.dtype).tiny) / LARGEST


def round_to(weight: Float[Tensor, "*rows"], scale: Float[Tensor, "*#rows"]) -> Float[Tensor, "*rows"]:
    """The nearest integers, times `scale`, that 4 bits hold."""
    return (weight / scale).round().clamp(-LARGEST, LARGEST)


def quantise_groups(
    weight: Float[Tensor, "out in"], group_size: int
) -> tuple[UInt8[Tensor, "out half"], Float[Tensor, "out groups"]]:
    """Each weight as a multiple of its group's scale, max |w| / 7, to which it is rounded; packed, and the scales.

    A last group that is not full is filled with zeros.
    """
    groups = F.pad(weight, (0, -weight.size(1) % group_size)).view(len(weight), -1, group_size)
    scale = group_scale(groups)
    return pack(round_to(groups, scale[..., None]).to(torch.int8).flatten(1)), scale


def dequantise_groups(
    packed: UInt8[Tensor, "out half"], scale: Float[Tensor, "out groups"], features: int
) -> Float[Tensor, "out in"]:
    """The matrix of so many `features` that `quantise_groups` has rounded to."""
    integers = unpack(packed).view(*scale.shape, -1)
    return (integers * scale[..., None]).flatten(1)[:, :features]


class Int4Linear(StoredLinear):
    """A linear map with a matrix in 4 bits, and a scale for each group of `group_size` weights."""

    weights_per_element: ClassVar[int] = 2

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        groups = -(-linear.in_features // group_size)
        shape = linear.out_features, groups * group_size // 2
        stored = torch.empty(shape, dtype=torch.uint8, device=linear.weight.device)
        super().__init__(linear, stored, linear.weight.new_empty(linear.out_features, groups))
        self.group_size = group_size

    def quantise(self, matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        return quantise_groups(matrix, self.group_size)

    @staticmethod
    def dequantise(weight: Tensor, scale: Tensor, features: int) -> Float[Tensor, "out in"]:
        return dequantise_groups(weight, scale, features)
