"""Whole runs by name: a model with the data and the training that suit it."""

from __future__ import annotations

from minitransformer.models.config import PRESETS as MODELS
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

DEFAULT = "gpt-micro"

SHORT = TrainingConfig(
    steps=750,
    batch_size=4,
    optimizer="muon",
    lr=0.03,
    embedding_lr=0.03,
    momentum=0.9,
    schedule="linear",
    warmup_steps=10,
    eval_every=250,
    save_every=250,
)
LONGER = TrainingConfig(
    steps=3000, batch_size=16, optimizer="muon", lr=0.02, embedding_lr=0.01, schedule="wsd", warmup_steps=100
)

PRESETS: dict[str, RunConfig] = {
    "gpt-nano": RunConfig(MODELS["gpt-nano"], training=SHORT),
    "gpt-micro": RunConfig(MODELS["gpt-micro"], training=SHORT),
    "gpt-mini": RunConfig(MODELS["gpt-mini"], training=LONGER),
    "gpt-small": RunConfig(MODELS["gpt-small"], training=LONGER),
    "gpt-medium": RunConfig(MODELS["gpt-medium"], training=LONGER),
    # GPT-2's shape with the batch of half a million tokens and the rates that nanoGPT reproduces it with.
    "gpt2-124m": RunConfig(
        MODELS["gpt2-124m"],
        DataConfig(tokenizer="gpt2"),
        TrainingConfig(
            steps=100_000, batch_size=8, grad_accumulation=64, lr=6e-4, min_lr=6e-5, warmup_steps=2000, save_every=1000
        ),
    ),
    # nanoGPT's README: 2000 steps in minutes on a CPU, to a validation loss of 1.88 by its sampled estimate.
    "nanogpt-cpu": RunConfig(
        MODELS["nanogpt-cpu"],
        DataConfig(data="shakespeare", tokenizer="chars"),
        TrainingConfig(
            steps=2000,
            batch_size=12,
            lr=1e-3,
            min_lr=1e-4,
            schedule="wsd",
            warmup_steps=100,
            beta2=0.99,
            save_every=500,
        ),
    ),
}
