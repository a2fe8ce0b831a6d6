"""Steps of training, ours and the peers', on the same tokens. Importing this imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minitransformer.benchmark.case import Setting
from minitransformer.benchmark.ours import config_of, random_tokens
from minitransformer.benchmark.peers import transformers_model
from minitransformer.models.model import build_model
from minitransformer.text.prepare import PreparedText
from minitransformer.text.tokenizers import Bytes
from minitransformer.training import machine
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.objectives import Objective
from minitransformer.training.optimizers import build_optimizers, set_learning_rate
from minitransformer.training.precision import Precision
from minitransformer.training.prefetch import prefetched
from minitransformer.training.presets import PRESETS
from minitransformer.training.step import training_step

NANOGPT_STEPS = 2000
Step = Callable[[], object]


def our_step(setting: Setting, precision: str, compiled: bool) -> Step:
    """A step of our training, from the batch to the update."""
    machine.keep_freed_memory()  # as a run does
    recipe = replace(PRESETS["nanogpt-cpu"].training, batch_size=setting.shape.batch_size, seed=setting.seed)
    config = RunConfig(config_of(setting.shape), DataConfig(tokenizer="bytes"), recipe)
    tokens = random_tokens(setting)
    return steps_of(
        config,
        PreparedText(Path(), Bytes(), tokens, tokens, 1, 1, 1, 1, "documents"),
        setting.device,
        precision,
        compiled,
    )[1]


def steps_of(
    config: RunConfig, prepared: PreparedText, device: str, precision: str, compiled: bool
) -> tuple[torch.nn.Module, Step]:
    """The model that `config` describes, and a step of its training."""
    training: TrainingConfig = config.training
    torch.manual_seed(training.seed)
    model = build_model(config.model).to(device).train()
    fast = machine.compiled(model) if compiled else model
    objective = Objective.named(training.objective)(prepared, config)
    batches_of = prefetched(objective.training_batches, torch.device(device))
    optimizers = build_optimizers(training.optimizer, model, training.rates)
    arithmetic = Precision.named(precision)(torch.device(device))
    balance = ExpertBalance(model, training.expert_balance)
    done = 0

    def step() -> object:
        nonlocal done
        set_learning_rate(optimizers, training.learning_rate_multiplier(done))
        batches = batches_of(done)
        done += 1
        return training_step(
            fast,
            objective,
            batches,
            optimizers,
            arithmetic,
            grad_clip=training.grad_clip,
            balance=balance,
        )

    return model, step


def nanogpt_step(setting: Setting, compiled: bool) -> Step:
    """A step as nanoGPT's `train.py` makes it: its optimizer, its batches; bf16 on a GPU, float32 on a CPU."""
    assert setting.against is not None
    torch.manual_seed(setting.seed)
    return nanogpt_steps(setting, random_tokens(setting), compiled)[1]


def nanogpt_steps(setting: Setting, tokens: np.ndarray, compiled: bool) -> tuple[torch.nn.Module, Step]:
    """Its model, and a step of its training on `tokens`, with the rates of its README's run on a CPU."""
    assert setting.against is not None
    cuda = setting.device.startswith("cuda")
    raw = setting.against.model(setting.shape, setting.device)
    optimizer = raw.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cuda" if cuda else "cpu")
    model = torch.compile(raw) if compiled else raw
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    done = 0

    def step() -> object:
        nonlocal done
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_rate(done)
        done += 1
        inputs, targets = _nanogpt_batch(tokens, setting)
        with autocast:
            _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return raw, step


def nanogpt_rate(step: int, *, highest: float = 1e-3, lowest: float = 1e-4, warmup: int = 100) -> float:
    """`get_lr` of its `train.py` with the numbers of its README's run on a CPU: warm-up, half a cosine, then flat."""
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    share = min(1.0, (step - warmup) / (NANOGPT_STEPS - warmup))
    return lowest + 0.5 * (1 + math.cos(math.pi * share)) * (highest - lowest)


def _nanogpt_batch(tokens: np.ndarray, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_batch` of its `train.py`."""
    length = setting.shape.context_length
    starts = torch.randint(len(tokens) - length, (setting.shape.batch_size,))
    inputs = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
    targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
    if setting.device.startswith("cuda"):
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(setting.device, non_blocking=True), targets.to(setting.device, non_blocking=True)


def transformers_step(setting: Setting, precision: str) -> Step:
    """A step of transformers' GPT-2 in a plain loop with AdamW; its loss is its own."""
    torch.manual_seed(setting.seed)
    model = transformers_model(setting.shape, setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens = random_tokens(setting)
    device = setting.device.partition(":")[0]
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step() -> object:
        inputs, _ = _nanogpt_batch(tokens, setting)
        with autocast:
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
