"""The load-balancing loss of mixtures of experts."""

from __future__ import annotations

from torch import Tensor, nn

from minitransformer.architecture.feedforward import MixtureOfExperts, load_balancing_loss


class ExpertBalance:
    """Records the routers of a model by hooks; the loss is 0 for a model without experts."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight = weight
        self._losses: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                self._add_hook(module)

    def _add_hook(self, mixture: MixtureOfExperts) -> None:
        def note(router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
            if mixture.training:
                self._losses.append(load_balancing_loss(logits.flatten(0, -2), mixture.experts_per_token))

        mixture.router.register_forward_hook(note)

    def loss(self) -> Tensor | float:
        """`weight` times the mean load-balancing loss over layers, in the forward pass since the last call."""
        losses, self._losses = self._losses, []
        return self.weight * sum(losses) / len(losses) if losses else 0.0
