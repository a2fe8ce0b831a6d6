"""Whole runs by name: a model with the data and the training that suit it."""

from __future__ import annotations

from minitransformer.models.config import PRESETS as MODELS
from minitransformer.models.config import ModelConfig
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

DEFAULT = "gpt-mini"

# nanoGPT's README trains this on a CPU; dropout, biases and the betas are those of its command and configuration file.
NANOGPT_CPU = RunConfig(
    model=ModelConfig(
        d_model=128, num_layers=4, num_heads=4, context_length=64, positions="learned", feedforward="gelu"
    ),
    data=DataConfig(data="shakespeare", tokenizer="chars"),
    training=TrainingConfig(
        steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99, eval_every=250, save_every=1000
    ),
)

PRESETS: dict[str, RunConfig] = {
    **{name: RunConfig(model=model) for name, model in MODELS.items()},
    "gpt2-124m": RunConfig(
        model=MODELS["gpt2-124m"],
        data=DataConfig(tokenizer="gpt2"),
        training=TrainingConfig(
            steps=100_000, batch_size=8, grad_accumulation=64, lr=6e-4, min_lr=6e-5, warmup_steps=2000, save_every=1000
        ),
    ),
    "nanogpt-cpu": NANOGPT_CPU,
}
