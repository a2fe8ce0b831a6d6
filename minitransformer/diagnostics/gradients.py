"""Gradients and updates of the weights of each sublayer, without the norms of its connection."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from minitransformer.diagnostics.activations import Loss
from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures, StepDiagnostic
from minitransformer.diagnostics.modules import sublayers_of

SPIKE, WINDOW, LEAST = 5.0, 50, 10


def weights_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable weights of each sublayer, by location."""
    found = {
        place: [weight for weight in branch.sublayer.parameters() if weight.requires_grad]
        for place, branch in sublayers_of(model).items()
    }
    return {place: weights for place, weights in found.items() if weights}


class GradientNorm(StepDiagnostic, name="gradient-norm"):
    """‖∂L/∂W‖ of the mean loss over a whole batch (the norm of the mean).

    In training, it is the gradient of the step, over all micro-batches and before clipping. Xiong et al.
    2020 (arXiv 2002.04745), figure 3.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        return gradient_norms(context.loss, weights_of(self.model))

    def before_update(self) -> None:
        self._norms = {
            place: total_norm(weight.grad for weight in weights if weight.grad is not None)
            for place, weights in weights_of(self.model).items()
        }

    def after_update(self) -> Figures:
        return self._norms


class ExampleGradientNorm(Diagnostic, name="example-gradient-norm"):
    """E‖∂Lᵢ/∂W‖ over examples i with mean losses Lᵢ (the mean of norms), by one backward pass per example.

    By the triangle inequality, at least the norm of the mean over the same examples, if they have equally many targets;
    the ratio measures how much they agree.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        weights = weights_of(self.model)
        norms = [gradient_norms(loss, weights) for loss in context.examples]
        return {place: torch.stack([example[place] for example in norms]).mean() for place in norms[0]}


class UpdateRatio(StepDiagnostic, name="update-ratio"):
    """‖ΔW‖ / ‖W‖ of a step, weight decay included; 0 for a step that was skipped."""

    def before_update(self) -> None:
        weights = weights_of(self.model)
        self._old = {place: [w.detach().clone() for w in ws] for place, ws in weights.items()}

    def after_update(self) -> Figures:
        old, self._old = self._old, {}
        return {
            place: total_norm(torch._foreach_sub([w.detach() for w in weights], old[place])) / total_norm(old[place])
            for place, weights in weights_of(self.model).items()
        }


class GradientSpikes(StepDiagnostic, name="gradient-spikes"):
    """Number of gradient-norm spikes since the last measurement: see `SpikeDetector`.

    The history of norms is lost on interruption: the first steps after it are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._detector, self._spikes = SpikeDetector(), 0

    def after_backward(self, grad_norm: float) -> None:
        self._spikes += self._detector.is_spike(grad_norm)

    def after_update(self) -> Figures:
        spikes, self._spikes = self._spikes, 0
        return {"": torch.tensor(spikes)}


class SpikeDetector:
    """A spike is a norm above 5 times the median of the previous 50, or an infinite or NaN norm.

    Only the latter counts for the first 10 norms.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, norm: float) -> bool:
        """Whether `norm`, the next one, is a spike."""
        if not math.isfinite(norm):
            return True
        spike = len(self._norms) >= LEAST and norm > SPIKE * statistics.median(self._norms)
        self._norms.append(norm)
        return spike


def gradient_norms(loss: Loss, weights: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """The gradient norm of `loss` for each entry of `weights`; `.grad` is not changed."""
    every = [weight for group in weights.values() for weight in group]
    gradients = iter(torch.autograd.grad(loss(), every, allow_unused=True))
    groups = {place: [next(gradients) for _ in group] for place, group in weights.items()}
    return {place: total_norm(g for g in group if g is not None) for place, group in groups.items()}


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all `tensors` as one vector."""
    tensors = [tensor.detach() for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors)).norm() if tensors else torch.zeros(())


def spikes(norms: Sequence[float]) -> list[bool]:
    """Which gradient norms of a run are spikes."""
    detector = SpikeDetector()
    return [detector.is_spike(norm) for norm in norms]
