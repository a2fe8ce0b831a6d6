"""Training to a target loss, ours and nanoGPT's. Importing this imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.benchmark.case import JUDGE, BenchSetting
from minitransformer.benchmark.ours import config_of, synchronise
from minitransformer.benchmark.stepping import NANOGPT_STEPS, TrainingStep, nanogpt_steps
from minitransformer.errors import UserError
from minitransformer.models.config import MODERN, ModelConfig
from minitransformer.text.batches import SequentialWindows
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets.text import PreparedText, TextPreparation
from minitransformer.text.tokenizers import Characters
from minitransformer.training.config import RunConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.learner import build_learner
from minitransformer.training.machine import choose_machine
from minitransformer.training.presets import PRESETS

FIRST_LOOK, GROWTH = 20, 1.1
"""steps before the first validation; each further one is 10 % later, which limits the precision of times"""
MOST_VALIDATION = 1 << 13
"""validation characters, the same for all, so that validation takes less time than training"""
Logits = Callable[[Tensor], Tensor]
SEEDS = count()
"""a new seed for each training in a process"""


def seconds_to_loss(setting: BenchSetting, recipe: str) -> float:
    """Seconds of training to the target validation loss; raises `UserError` if it is not reached."""
    setting = replace(setting, seed=setting.seed + next(SEEDS))
    corpus, length = open_corpus(setting.data), setting.shape.context_length
    prepared = TextPreparation(corpus, Characters.choose(), context_length=length, progress=False).run()
    setting = replace(setting, shape=replace(setting.shape, vocab_size=prepared.tokenizer.vocab_size))
    return _nanogpt(setting, prepared) if recipe == "nanogpt" else _ours(setting, recipe, prepared)


@dataclass
class _Clock:
    """A stopwatch."""

    device: str
    seconds: float = 0.0
    _since: float = field(default=0.0)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        synchronise(self.device)
        self.seconds += time.perf_counter() - self._since


def _nanogpt(setting: BenchSetting, prepared: PreparedText) -> float:
    torch.manual_seed(setting.seed)
    model, step = nanogpt_steps(setting, prepared.train, compiled=False)
    return _until_reached(setting, NANOGPT_STEPS, prepared, model, step, lambda inputs: model(inputs, inputs)[0])


def _ours(setting: BenchSetting, recipe: str, prepared: PreparedText) -> float:
    classic = PRESETS["nanogpt-cpu"].training
    if recipe == "classic":
        config = RunConfig(config_of(setting.shape), DataConfig(tokenizer="chars"), classic)
    else:
        training = replace(PRESETS["gpt-micro"].training, batch_size=setting.shape.batch_size)
        config = RunConfig(_modern(config_of(setting.shape)), DataConfig(tokenizer="chars"), training)
    training = replace(config.training, batch_size=setting.shape.batch_size, seed=setting.seed)
    machine = choose_machine(setting.device, "auto", "off", run_flops=0)
    config = replace(config, training=training)
    learner = build_learner(config, prepared, machine)
    model = learner.model
    return _until_reached(setting, training.steps, prepared, model, lambda: learner.step(learner.next_batches()), model)


def _modern(config: ModelConfig) -> ModelConfig:
    sizes = ("num_layers", "num_heads", "d_model", "context_length", "vocab_size", "dropout")
    return replace(MODERN, **{name: getattr(config, name) for name in sizes})


def _until_reached(
    setting: BenchSetting, steps: int, prepared: PreparedText, model: nn.Module, step: TrainingStep, logits: Logits
) -> float:
    """Seconds of the steps until the loss is reached; the schedule ends after `steps`."""
    clock, look = _Clock(setting.device), FIRST_LOOK
    for done in range(1, steps + 1):
        clock.start()
        step()
        clock.stop()
        if done == look:
            loss = _validation_loss(setting, prepared, model, logits)
            if loss <= setting.target_loss:
                return clock.seconds
            look = int(look * GROWTH) + 1
    raise UserError(f"{steps} steps did not reach a {JUDGE.label} of {setting.target_loss:g}: raise --target-loss")


@torch.no_grad()
def _validation_loss(setting: BenchSetting, prepared: PreparedText, model: nn.Module, logits: Logits) -> float:
    """Nats per character over the beginning of the validation split."""
    model.eval()
    nats, targets = 0.0, 0
    for batch in SequentialWindows(prepared.validation[:MOST_VALIDATION], setting.shape.context_length, 64):
        batch = batch.to(setting.device)
        nats += float(F.cross_entropy(logits(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="sum"))
        targets += batch.num_targets
    model.train()
    return nats / targets
