"""Fewer layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from minitransformer.compression.base import Compression
from minitransformer.compression.calibration import Calibration
from minitransformer.diagnostics.modules import stacks_of
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts
from minitransformer.settings import flat, setting, with_settings

TOLERANCE = 1e-4
"""of a loss, relative: what is left without a layer computes what the smaller model does"""


class DropLayers(Compression, name="drop-layers"):
    """Leaves out the layers without which the loss on training data rises least, one after the other.

    Kim et al. 2024 (Shortened LLaMA, arXiv 2402.02834), section 3.2, with a new measurement after each.
    """

    @dataclass(frozen=True)
    class Settings:
        count: int = setting(1, at_least=1, help="layers to leave out")

    settings: Settings

    def check(self, model: Model) -> None:
        there = sum(len(stack.blocks) - 1 for stack in stacks_of(model).values())
        if self.settings.count > there:
            raise UserError(f"drop_layers_count is {self.settings.count}, and {there} can be left out: give fewer")

    def applied(self, model: Model, calibration: Calibration | None) -> Model:
        assert calibration is not None
        kept = {name: list(range(len(stack.blocks))) for name, stack in stacks_of(model).items()}
        loss = calibration.run(model)
        for _ in range(self.settings.count):
            before, found = loss, {}
            for name, layers in kept.items():
                for layer in layers if len(layers) > 1 else ():
                    with only_layers(model, _without(kept, name, layer)):
                        found[name, layer] = calibration.run(model)
            name, layer = min(found, key=lambda which: found[which])
            kept, loss = _without(kept, name, layer), found[name, layer]
            self.remarks.append(
                f"dropped    layer {layer + 1} of {name}: loss {before:.4f} with it and {loss:.4f} without, on the "
                "calibration data"
            )
        return _with_layers(model, kept, loss, calibration)


def _without(kept: dict[str, list[int]], name: str, layer: int) -> dict[str, list[int]]:
    return {**kept, name: [each for each in kept[name] if each != layer]}


@contextmanager
def only_layers(model: Model, kept: dict[str, list[int]]) -> Iterator[None]:
    """Runs `model` without the layers that are not `kept`, inside the block."""
    stacks = stacks_of(model)
    before = {name: stack.run_block for name, stack in stacks.items()}
    try:
        for name, layers in kept.items():
            left_out = [block for layer, block in enumerate(stacks[name].blocks) if layer not in layers]
            stacks[name].run_block = partial(_run_unless, before[name], left_out)
        yield
    finally:
        for name, stack in stacks.items():
            stack.run_block = before[name]


def _run_unless(
    run: Callable[..., Any], left_out: Sequence[nn.Module], block: nn.Module, stream: Any, **given: Any
) -> Any:
    return stream if block in left_out else run(block, stream, **given)


def _with_layers(model: Model, kept: dict[str, list[int]], loss: float, calibration: Calibration) -> Model:
    """The model with the `kept` layers alone, whose loss is `loss`; raises `UserError` if there is none."""
    config = _shortened(model.config, kept)
    state = {}
    for key, tensor in model.state_dict().items():
        name, blocks, rest = key.partition(".blocks.")
        layer, dot, weight = rest.partition(".")
        if not blocks:
            state[key] = tensor
        elif int(layer) in kept[name]:
            state[f"{name}{blocks}{kept[name].index(int(layer))}{dot}{weight}"] = tensor
    with torch.random.fork_rng(devices=()):
        shorter = build_in_parts(config).eval()
    fits = {name: part.shape for name, part in shorter.state_dict().items()}
    if fits == {name: part.shape for name, part in state.items()}:
        shorter.load_state_dict(state)
        if math.isclose(calibration.run(shorter), loss, rel_tol=TOLERANCE):
            return shorter
    raise UserError(
        f"with residual {config.residual.name!r}, a layer depends on how many there are: no layer can be dropped"
    )


def _shortened(config: ModelConfig, kept: dict[str, list[int]]) -> ModelConfig:
    counts = {name: len(layers) for name, layers in kept.items()}
    first = kept.get("encoder") or kept.get("stack") or []
    if 0 not in first:  # what was the second layer has a norm
        config = replace(config, first_norm=True)
    if config.attention_window is not None:
        config = replace(config, window_pattern=tuple(config.window_of(layer) is not None for layer in first))
    turns = flat(config).get("rotary_layers", (True,))
    if not all(turns):
        config = with_settings(config, {"rotary_layers": tuple(turns[layer % len(turns)] for layer in first)})
    if "decoder" in counts:
        return replace(config, num_layers=counts["encoder"], num_decoder_layers=counts["decoder"])
    return replace(config, num_layers=counts["stack"])
