"""Rounding to 4 bits that keeps what a matrix computes, instead of its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from minitransformer.models.int4 import group_scale, round_to

DAMPING = 0.01
"""of the mean of the diagonal, added to it: section 3.3, step 3"""


def rounded_by_gptq(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], group_size: int
) -> tuple[Int8[Tensor, "out padded"], Float[Tensor, "out groups"]]:
    """Integers and scales that minimise ‖(W − Ŵ) X‖² greedily, for H = 2 X Xᵀ of the inputs X.

    Each column is rounded in turn, and its error is made up for by those that are left: with Hᵤ the upper Cholesky
    factor of H⁻¹, E = (w − ŵ) / Hᵤ[i, i] and W[:, i:] −= E Hᵤ[i, i:], in blocks of columns that share a scale, which
    is that of what the weights have become. Frantar et al. 2022 (GPTQ, arXiv 2210.17323), algorithm 1. A last group
    that is not full is filled with zeros.
    """
    weight = F.pad(weight, (0, -weight.size(1) % group_size)).clone()
    factor = _factor_of_inverse(hessian, weight.size(1))
    integers, scales = torch.empty_like(weight, dtype=torch.int8), []
    for begin in range(0, weight.size(1), group_size):
        end = begin + group_size
        scale = group_scale(weight[:, begin:end])
        errors = torch.empty_like(weight[:, begin:end])
        for i in range(begin, end):
            integers[:, i] = column = round_to(weight[:, i], scale)
            error = (weight[:, i] - column * scale) / factor[i, i]
            weight[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
        scales.append(scale)
    return integers, torch.stack(scales, dim=1)


def _factor_of_inverse(hessian: Float[Tensor, "in in"], size: int) -> Float[Tensor, "size size"]:
    """The upper Cholesky factor of H⁻¹, damped; an input that was always 0 is left to itself."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    more = size - len(hessian)
    hessian = F.pad(hessian, (0, more, 0, more))
    hessian.diagonal()[size - more :] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
