"""Presets: complete run configurations by name."""

from __future__ import annotations

from dataclasses import replace

from minitransformer.models.config import PRESETS as MODELS
from minitransformer.text.datasets import Pairs
from minitransformer.training.config import RunConfig, TrainingConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.objectives import Seq2Seq
from minitransformer.training.optimizers import AdamW, MuonWithAdamW

DEFAULT = "gpt-micro"

SHORT = TrainingConfig(
    steps=750,
    batch_size=4,
    optimizer=MuonWithAdamW.choose(momentum=0.9),
    lr=0.03,
    embedding_lr=0.03,
    schedule="linear",
    warmup_steps=10,
    eval_every=250,
    save_every=250,
)
LONGER = TrainingConfig(
    steps=3000, batch_size=16, optimizer="muon", lr=0.02, embedding_lr=0.01, schedule="wsd", warmup_steps=100
)

SHAKESPEARE = DataConfig(data="shakespeare", tokenizer="chars")
NUMBERS = DataConfig(data="numbers", tokenizer="bytes")
PAIRS = TrainingConfig(
    objective="seq2seq",
    steps=1500,
    optimizer="muon",
    lr=0.02,
    embedding_lr=0.01,
    schedule="linear",
    warmup_steps=50,
    eval_every=500,
    save_every=500,
)

PRESETS: dict[str, RunConfig] = {
    "gpt-nano": RunConfig(MODELS["gpt-nano"], training=SHORT),
    "gpt-micro": RunConfig(MODELS["gpt-micro"], training=SHORT),
    "gpt-mini": RunConfig(MODELS["gpt-mini"], training=LONGER),
    "gpt-small": RunConfig(MODELS["gpt-small"], training=LONGER),
    "gpt-medium": RunConfig(MODELS["gpt-medium"], training=LONGER),
    # GPT-2's shape, with the batch of half a million tokens and the learning rates of nanoGPT's reproduction.
    "gpt2-124m": RunConfig(
        MODELS["gpt2-124m"],
        DataConfig(tokenizer="gpt2"),
        TrainingConfig(
            steps=100_000, batch_size=8, grad_accumulation=64, lr=6e-4, min_lr=6e-5, warmup_steps=2000, save_every=1000
        ),
    ),
    "bert-mini": RunConfig(
        MODELS["bert-mini"],
        training=replace(SHORT, objective="masked", steps=2000, batch_size=16, eval_every=500, save_every=500),
    ),
    "t5-mini": RunConfig(
        MODELS["t5-mini"],
        training=replace(SHORT, objective="span-corruption", steps=1500, batch_size=16, eval_every=500, save_every=500),
    ),
    "transformer-mini": RunConfig(MODELS["transformer-mini"], NUMBERS, PAIRS),
    "rnn-attention": RunConfig(MODELS["rnn-attention"], NUMBERS, replace(PAIRS, optimizer="adamw", lr=2e-3)),
    # The shape of Wu et al. 2021 (arXiv 2105.14462), with a recipe for minutes, not hours; data is given by flag.
    "multi30k-tiny": RunConfig(
        MODELS["multi30k-tiny"],
        DataConfig(dataset=Pairs.choose(lowercase=True)),
        TrainingConfig(
            objective=Seq2Seq.choose(label_smoothing=0.1),
            steps=3000,
            optimizer="muon",
            lr=0.02,
            embedding_lr=5e-3,
            schedule="linear",
            warmup_steps=100,
            eval_every=500,
            save_every=500,
        ),
    ),
    # To a validation loss of 1.88, which nanoGPT's README has after its 2000 steps, in seconds.
    "shakespeare-fast": RunConfig(
        MODELS["shakespeare-fast"],
        SHAKESPEARE,
        replace(
            SHORT,
            steps=145,
            batch_size=16,
            lr=0.04,
            embedding_lr=0.035,
            head_lr=0.005,
            optimizer=MuonWithAdamW.choose(momentum=0.85, newton_schulz="polar-express", newton_schulz_steps=3),
            warmup_steps=1,
        ),
    ),
    # To below 1.4697, which nanoGPT's README has after minutes on a GPU, on two cores of a CPU.
    "shakespeare": RunConfig(
        MODELS["shakespeare"],
        SHAKESPEARE,
        replace(SHORT, steps=3200, head_lr=0.005, batch_size=8, weight_decay=0.1, eval_every=400, save_every=400),
    ),
    # nanoGPT's README: 2000 steps in minutes on a CPU, to a validation loss of 1.88 by its sampled estimate.
    "nanogpt-cpu": RunConfig(
        MODELS["nanogpt-cpu"],
        SHAKESPEARE,
        TrainingConfig(
            steps=2000,
            batch_size=12,
            lr=1e-3,
            min_lr=1e-4,
            schedule="wsd",
            warmup_steps=100,
            optimizer=AdamW.choose(beta2=0.99),
            save_every=500,
        ),
    ),
}
