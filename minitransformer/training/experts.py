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
        self._recording, self._counted = False, True
        self._routed: list[tuple[Tensor, int]] = []
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                self._add_hook(module)

    def _add_hook(self, mixture: MixtureOfExperts) -> None:
        def note(router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
            if self._recording:
                self._routed.append((logits, mixture.experts_per_token))

        mixture.router.register_forward_hook(note)

    def record(self, *, counted: bool) -> None:
        """Record the next forward pass, until `loss`; its tokens count if `counted`."""
        self._routed, self._recording, self._counted = [], True, counted

    def loss(self) -> Tensor | float:
        """`weight` times the mean load-balancing loss over layers, in the recorded forward pass."""
        routed, self._routed, self._recording = self._routed, [], False
        losses = [self._loss(logits, chosen) for logits, chosen in routed]
        return self.weight * sum(losses) / len(losses) if losses else 0.0

    def _loss(self, logits: Tensor, experts_per_token: int) -> Tensor:
        counted = logits.flatten(0, -2) if self._counted else logits.new_empty(0, logits.size(-1))
        return load_balancing_loss(counted, experts_per_token, self.ranks.sum)
