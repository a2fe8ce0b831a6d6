"""Statistics of the residual stream between layers, over tokens without padding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures

LARGEST_FP16 = torch.finfo(torch.float16).max


class StreamVariance(Diagnostic, name="stream-variance"):
    """E‖x‖² over tokens, for the input of a stack ("stack.input") and the output of each layer.

    Xiong et al. 2020 (arXiv 2002.04745), lemma 2.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        figures: Figures = {}
        for place, change in context.record.layers.items():
            stack, _, layer = place.rpartition(".")
            if layer == "0":
                figures[f"{stack}.input"] = mean_square_norm(change.x_before)
            figures[place] = mean_square_norm(change.x_after)
        return figures


class RepresentationChange(Diagnostic, name="representation-change"):
    """ω² = E‖N(x′) − N(x)‖² / d over tokens, x before and x′ after, N a LayerNorm without gain and bias.

    For each layer and each residual connection; near 0, deep layers change little (representation
    collapse). Xie et al. 2023 (ResiDual, arXiv 2304.14802), section 2.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        changes = context.record.layers | context.record.connections
        return {place: representation_change(change.x_before, change.x_after) for place, change in changes.items()}


class AngularDistance(Diagnostic, name="angular-distance"):
    """arccos(cos(x, x′)) / π, mean over tokens, x before and x′ after each layer: 0 the same direction, 1 the opposite.

    Gromov et al. 2024 (arXiv 2403.17887), section 3.2, who use the last token only.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        layers = context.record.layers.items()
        return {place: angular_distance(change.x_before, change.x_after) for place, change in layers}


class FP16Margin(Diagnostic, name="fp16-margin"):
    """65504 / max|x|: how many times larger the largest value could be before float16 overflows.

    For all parts of the stream after each layer, and for sublayer outputs, but not inside sublayers.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        streams = {place: _parts(change.after) for place, change in context.record.layers.items()}
        outputs = {place: [output] for place, output in context.record.outputs.items()}
        return {place: LARGEST_FP16 / _largest(tensors) for place, tensors in (streams | outputs).items()}


class OutlierRatio(Diagnostic, name="outlier-ratio"):
    """max|x| / median|x| over tokens and features of the stream after each layer."""

    def measure(self, context: DiagnosticContext) -> Figures:
        sizes = {place: change.x_after.abs() for place, change in context.record.layers.items()}
        return {place: size.max() / size.median() for place, size in sizes.items()}


def mean_square_norm(x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """E‖x‖²."""
    return x.square().sum(-1).mean()


def representation_change(
    before: Float[Tensor, "tokens d_model"], after: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, ""]:
    """E‖N(after) − N(before)‖² / d with a plain LayerNorm N."""
    normed_before, normed_after = (F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in (before, after))
    return (normed_after - normed_before).square().mean()


def angular_distance(
    before: Float[Tensor, "tokens d_model"], after: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, ""]:
    """The mean angle between both, in units of π."""
    # The half-angle formula: the arccosine of a cosine near 1 would lose half of the digits.
    a, b = F.normalize(before, dim=-1), F.normalize(after, dim=-1)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return angle.mean() / math.pi


def _parts(stream: Any) -> Iterable[Tensor]:
    return [stream] if isinstance(stream, Tensor) else stream


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.abs().max().float() for tensor in tensors]).max()
