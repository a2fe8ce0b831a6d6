"""The load-balancing loss of mixtures of experts."""

from __future__ import annotations

from torch import Tensor, nn

from minitransformer.architecture.feedforward import MixtureOfExperts, load_balancing_loss
from minitransformer.training.ranks import ONE_PROCESS, Ranks


class ExpertBalance:
    """Records the routers of a model by hooks; the loss is 0 for a model without experts.

    Which fraction of the tokens an expert gets is counted over all `ranks`, as if their rows were one batch.
    """

    def __init__(self, model: nn.Module, weight: float, ranks: Ranks = ONE_PROCESS) -> None:
        self.weight, self.ranks = weight, ranks
        self.counts = True
        """whether the tokens of the next forward pass count"""
        self._losses: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                self._add_hook(module)

    def _add_hook(self, mixture: MixtureOfExperts) -> None:
        def note(router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
            if mixture.training:
                counted = logits.flatten(0, -2) if self.counts else logits.new_empty(0, logits.size(-1))
                self._losses.append(load_balancing_loss(counted, mixture.experts_per_token, self.ranks.sum))

        mixture.router.register_forward_hook(note)

    def loss(self) -> Tensor | float:
        """`weight` times the mean load-balancing loss over layers, in the forward pass since the last call."""
        losses, self._losses = self._losses, []
        return self.weight * sum(losses) / len(losses) if losses else 0.0
