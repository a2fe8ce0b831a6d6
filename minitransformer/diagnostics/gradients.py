"""Gradients and updates of the weights of each sublayer: those of its module, without the norms around it."""

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
    """The weights of each sublayer that are learned, by place."""
    found = {
        place: [weight for weight in branch.sublayer.parameters() if weight.requires_grad]
        for place, branch in sublayers_of(model).items()
    }
    return {place: weights for place, weights in found.items() if weights}


class GradientNorm(StepDiagnostic, name="gradient-norm"):
    """‖∂L/∂W‖, the norm of the mean: of the gradient of the mean loss of a whole batch.

    In training, it is the gradient of the step itself, over all its micro-batches and before clipping. Xiong et al.
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
    """E‖∂Lᵢ/∂W‖, the mean of norms: over examples i, each of which has a backward pass of its own for its mean loss Lᵢ.

    Never below the norm of the mean over the same examples, where they have equally many targets: the triangle
    inequality. The ratio says how much they agree.
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
    """How many steps since the last measurement had a spike of the norm of the whole gradient: see `SpikeDetector`.

    The norms are forgotten when a run is interrupted: the first steps after it count as no spikes.
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
    """A spike is a norm above 5 times the median of the last 50 before it, or one that is infinite or NaN.

    Before there are 10 norms to compare with, only the latter are.
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
    """The norm of the gradient of `loss` by each entry of `weights`; `.grad` of the weights stays what it is."""
    every = [weight for group in weights.values() for weight in group]
    gradients = iter(torch.autograd.grad(loss(), every, allow_unused=True))
    groups = {place: [next(gradients) for _ in group] for place, group in weights.items()}
    return {place: total_norm(g for g in group if g is not None) for place, group in groups.items()}


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all `tensors` as one vector."""
    tensors = [tensor.detach() for tensor in tensors]
    return torch.stack(torch._foreach_norm(tensors)).norm() if tensors else torch.zeros(())


def spikes(norms: Sequence[float]) -> list[bool]:
    """Which of the gradient norms of a whole run are spikes."""
    detector = SpikeDetector()
    return [detector.is_spike(norm) for norm in norms]
