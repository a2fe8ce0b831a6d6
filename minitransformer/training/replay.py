"""Replaying the step in a black box, and finding the module in which its numbers stop being finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minitransformer.models.model import build_model
from minitransformer.text.batches import TrainingBatch
from minitransformer.training.black_box import BlackBox
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine
from minitransformer.training.tracing import Origin, Tracer
from minitransformer.training.weights import load_model_weights

ROUNDING = 1e-3
"""relative difference of a loss on another machine that is due to rounding"""


@dataclass(frozen=True)
class Replay:
    """What a replay of `box` has given: the loss, the gradient norm, and where numbers stopped being finite."""

    box: BlackBox
    machine: Machine
    loss: float
    grad_norm: float
    forward: Origin | None
    backward: Origin | None

    @property
    def is_exact(self) -> bool:
        """Whether the loss and the gradient norm are those that were recorded, if any, bit for bit."""
        return all(_same(*pair) for pair in self._pairs)

    @property
    def is_close(self) -> bool:
        """Whether they are as recorded but for rounding."""
        return all(_same(*pair) or math.isclose(*pair, rel_tol=ROUNDING) for pair in self._pairs)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the step was recorded on another kind of machine."""
        return self.machine.description.partition("(")[0] != self.box.machine_in_words.partition("(")[0]

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        both = (self.loss, self.box.loss), (self.grad_norm, self.box.grad_norm)
        return [(now, then) for now, then in both if then is not None]


def _same(now: float, then: float) -> bool:
    return now == then or (math.isnan(now) and math.isnan(then))


class BoxedBatches(Loader):
    """The batches in a black box, in place of data."""

    def __init__(self, box: BlackBox) -> None:
        config = box.config
        self.objective = config.training.objective.make(box.tokenizers[0], config.model, config.sequence_length)
        self.batches = box.batches

    def training_batches(self, step: int) -> Sequence[TrainingBatch]:
        return self.batches


def replay(box: BlackBox, machine: Machine) -> Replay:
    """Run the step in `box` twice on `machine`: as it was trained, and module by module."""
    learner = learner_of(box, machine)
    result = learner.step(learner.next_batches())
    learner = learner_of(box, replace(machine, compile=False))
    tracer = Tracer(learner.model)
    with tracer.tracing():
        learner.step(learner.next_batches())
    figures = result.loss.item(), result.grad_norm.item()
    return Replay(box, machine, *figures, tracer.forward.origin, tracer.backward.origin)


def learner_of(box: BlackBox, machine: Machine) -> Learner:
    """The learner in `box`, before the step."""
    torch.manual_seed(box.config.training.seed)
    model = build_model(box.config.model)
    load_model_weights(box.path, model)
    learner = Learner(box.config, model.to(machine.device).train(), BoxedBatches(box), machine)
    learner.load_state_dict(box.state)
    return learner
