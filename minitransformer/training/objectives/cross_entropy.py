"""Cross-entropy from hidden states, without materialising all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from minitransformer.text.batches import IGNORE

# Below this number of logits, chunking saves little memory.
TokenLoss = Callable[..., Tensor]
"""of logits and what is beside them, summed over tokens"""
FEWEST_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


def summed_loss(
    head: nn.Module,
    hidden: Float[Tensor, "*batch d_model"],
    targets: Int64[Tensor, "*batch"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """−Σ log softmax(head(hidden))[target] over targets that are not IGNORE, with optional label smoothing.

    Many logits are computed in chunks of tokens. If gradients are needed, those of hidden states and weights are
    computed in the same pass, so that no logits are stored or recomputed. Hsu et al. 2024 (Liger Kernel,
    arXiv 2410.10989), section 3.2; Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009), section 3.
    Second derivatives are not supported.
    """
    loss = partial(cross_entropy_sum, label_smoothing=label_smoothing)
    return sum_in_chunks(head, hidden.flatten(0, -2), loss, targets.flatten())


def sum_in_chunks(
    head: nn.Module, hidden: Float[Tensor, "tokens d_model"], loss: TokenLoss, *beside: Tensor
) -> Float[Tensor, ""]:
    """`loss` of the logits of all tokens and what is `beside` them, a row for each, summed over chunks of tokens."""
    size = tokens_at_once(head, hidden)
    if len(hidden) <= size:
        return loss(head(hidden), *beside)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if torch.is_grad_enabled():
        return _LossInChunks.apply(head, hidden, loss, size, len(beside), *beside, *weights)
    parts = zip(hidden.split(size), *(each.split(size) for each in beside), strict=True)
    return torch.stack([loss(head(x), *y) for x, *y in parts]).sum()


def token_losses(
    head: nn.Module, hidden: Float[Tensor, "*batch d_model"], targets: Int64[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """−log softmax(head(hidden))[target] of each target, 0 for IGNORE; in the chunks of `summed_loss`."""
    size = tokens_at_once(head, hidden)
    parts = zip(hidden.flatten(0, -2).split(size), targets.flatten().split(size), strict=True)
    nats = [F.cross_entropy(head(x), y, ignore_index=IGNORE, reduction="none") for x, y in parts]
    return torch.cat(nats).view_as(targets)


def score_tokens(
    head: nn.Module, hidden: Float[Tensor, "*batch d_model"], targets: Int64[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """`token_losses`, and whether each target has the highest logit."""
    size = tokens_at_once(head, hidden)
    nats, right = [], []
    for x, y in zip(hidden.flatten(0, -2).split(size), targets.flatten().split(size), strict=True):
        logits = head(x)
        nats.append(F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="none"))
        right.append(logits.argmax(-1) == y)
    return torch.cat(nats).view_as(targets), torch.cat(right).view_as(targets)


def tokens_at_once(head: nn.Module, hidden: Float[Tensor, "*batch d_model"]) -> int:
    """Number of tokens per chunk of logits.

    It is d_model: then a chunk takes the memory of the head's weight, whose gradient is allocated
    anyway, and accumulating such gradients is cheap. More, if a chunk would have fewer than FEWEST_LOGITS; a quarter
    of that for a frozen head, beside which that much would be most of the memory.
    """
    outputs = max([1, *(weight.size(0) for weight in head.parameters())])
    fewest = FEWEST_LOGITS["cuda" if hidden.is_cuda else "cpu"]
    if any(weight.requires_grad for weight in head.parameters()):
        return max(hidden.size(-1), fewest // outputs)
    return max(1, fewest // 4 // outputs)


def cross_entropy_sum(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)


class _LossInChunks(torch.autograd.Function):
    """The loss with its gradients from the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        hidden: Tensor,
        loss_of: TokenLoss,
        size: int,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        beside, weights = tensors[:count], tensors[count:]
        losses, hidden_gradients = [], torch.empty_like(hidden)
        sums = [torch.zeros_like(weight) for weight in weights]
        split = [each.split(size) for each in (hidden_gradients, hidden, *beside)]
        for hidden_gradient, x, *y in zip(*split, strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = loss_of(head(x), *y)
            gradient, *gradients = torch.autograd.grad(loss, [x, *weights])
            hidden_gradient.copy_(gradient)
            if sums:
                torch._foreach_add_(sums, gradients)
            losses.append(loss.detach())
        ctx.save_for_backward(hidden_gradients, *sums)
        ctx.count = count
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        hidden_gradients, *sums = ctx.saved_tensors
        none = (None,) * (3 + ctx.count)
        return None, gradient * hidden_gradients, *none, *(gradient * total for total in sums)
