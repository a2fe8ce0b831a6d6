"""The contribution of single layers to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures
from minitransformer.diagnostics.modules import layers_of


class SkippedLayer(Diagnostic, name="skipped-layer"):
    """Increase of the loss, in nats per target, when a layer is skipped (replaced by the identity).

    Each layer costs a forward pass, so a training run measures one layer at a time, in turn. Veit et al. 2016
    (arXiv 1605.06431), section 4.1.
    """

    def measure(self, context: DiagnosticContext) -> Figures:
        blocks, record = layers_of(self.model), context.record
        figures: Figures = {}
        # Layers before the skipped one need not run again.
        done: dict[nn.Module, Any] = {}
        places = list(record.layers)
        due = places if context.turn is None else [places[context.turn % len(places)]]
        for place, change in record.layers.items():
            if place in due:
                with torch.no_grad(), replayed(done | {blocks[place]: change.before}):
                    figures[place] = context.loss() - record.loss
            done[blocks[place]] = change.after
        return figures


@contextmanager
def replayed(streams: dict[nn.Module, Any]) -> Iterator[None]:
    """Within it, each of these blocks returns its given stream, whatever its input."""
    for block, stream in streams.items():
        vars(block)["forward"] = lambda *_, stream=stream, **__: stream
    try:
        yield
    finally:
        for block in streams:
            del vars(block)["forward"]
