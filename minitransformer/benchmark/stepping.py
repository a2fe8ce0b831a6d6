"""Training steps of ours and of peers on the same tokens. Importing this imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minitransformer.benchmark.case import BenchSetting
from minitransformer.benchmark.ours import config_of, training_tokens
from minitransformer.benchmark.peers import transformers_model
from minitransformer.text.datasets.text import PreparedText
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.config import RunConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.learner import build_learner
from minitransformer.training.machine import Machine
from minitransformer.training.presets import PRESETS

NANOGPT_STEPS = 2000
TrainingStep = Callable[[], object]


def our_step(setting: BenchSetting, precision: str, compiled: bool) -> TrainingStep:
    """Our training step, from the batch to the update."""
    recipe = replace(PRESETS["nanogpt-cpu"].training, batch_size=setting.shape.batch_size, seed=setting.seed)
    config = RunConfig(config_of(setting.shape), DataConfig(tokenizer="bytes"), recipe)
    tokens = training_tokens(setting)
    text = PreparedText(Path(), Bytes(), tokens, tokens, 1, 1, 1, 1, "documents")
    machine = Machine(torch.device(setting.device), precision, compiled, description="")
    learner = build_learner(config, text, machine)
    return lambda: learner.step(learner.next_batches())


def nanogpt_step(setting: BenchSetting, compiled: bool) -> TrainingStep:
    """A training step as in nanoGPT's `train.py`: its optimizer and batches; bf16 on a GPU, float32 on a CPU."""
    assert setting.against is not None
    torch.manual_seed(setting.seed)
    return nanogpt_steps(setting, training_tokens(setting), compiled)[1]


def nanogpt_steps(setting: BenchSetting, tokens: np.ndarray, compiled: bool) -> tuple[torch.nn.Module, TrainingStep]:
    """Its model and a training step on `tokens`, with the learning rates of its README's CPU run."""
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
    """`get_lr` of its `train.py` with the settings of its README's CPU run: warm-up, cosine decay, then constant."""
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    share = min(1.0, (step - warmup) / (NANOGPT_STEPS - warmup))
    return lowest + 0.5 * (1 + math.cos(math.pi * share)) * (highest - lowest)


def _nanogpt_batch(tokens: np.ndarray, setting: BenchSetting) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_batch` of its `train.py`."""
    length = setting.shape.context_length
    starts = torch.randint(len(tokens) - length, (setting.shape.batch_size,))
    inputs = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
    targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
    if setting.device.startswith("cuda"):
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(setting.device, non_blocking=True), targets.to(setting.device, non_blocking=True)


def transformers_step(setting: BenchSetting, precision: str) -> TrainingStep:
    """A step of transformers' GPT-2 in a plain loop with AdamW; its loss is its own."""
    torch.manual_seed(setting.seed)
    model = transformers_model(setting.shape, setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens = training_tokens(setting)
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
