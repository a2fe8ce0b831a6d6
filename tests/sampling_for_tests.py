"""Runs to sample from, and `sample.py` called in their folder, for the tests of several files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import sample
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.streaming import stream_text
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

SCRIPT = Path(__file__).parent.parent / "sample.py"
CONTEXT = 32
TOKENIZER = Tokenizer.named("chars").fit(lambda: iter(["abcdé \n"]))
MODEL = ModelConfig(d_model=16, num_layers=1, num_heads=2, context_length=CONTEXT, vocab_size=16)


def sampled_runs(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """A folder with the run `runs/chars`, whose model has more tokens than its tokenizer."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.manual_seed(1)
    write_run(folder / "runs" / "chars", [shake(DecoderLM(MODEL)), shake(DecoderLM(MODEL))])
    return folder


def endless_run(tmp_path_factory: pytest.TempPathFactory, shake: Callable[[DecoderLM], DecoderLM]) -> Path:
    """A run whose model knows nothing: all its logits are 0, and the greedy choice is for ever the first character."""
    path = tmp_path_factory.mktemp("sampling") / "endless"
    model = shake(DecoderLM(replace(MODEL, tied_embeddings=False)))
    torch.nn.init.zeros_(model.head.weight)
    write_run(path, [model])
    return path


def write_run(path: Path, checkpoints: list[DecoderLM], tokenizer: Tokenizer = TOKENIZER) -> None:
    config = RunConfig(checkpoints[0].config, DataConfig(), TrainingConfig())
    run = Run(path, config, tokenizer, tokenizer, text="none")
    run.checkpoints.mkdir(parents=True)
    tokenizer.save(path / "tokenizer.json")
    run.reconfigured(config)
    for step, model in enumerate(checkpoints, start=1):
        write_checkpoint(run.checkpoints, step, model, {})


def sample_command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of `runs`, with the bytes that are piped in; gives code, output and notes."""

    def call(*arguments: str, piped: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.chdir(runs)
        source = os.devnull
        if piped is not None:
            source = str(runs / "piped")
            Path(source).write_bytes(piped)
        with open(source, encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = sample.main(["--device", "cpu", "--max-new-tokens", "10", *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def continued(runs: Path, prompt: str, checkpoint: str | None = None, **settings: Any) -> list[str]:
    run = Run.open(runs / "runs" / "chars")
    options = SamplingConfig(**{"max_new_tokens": 10, "seed": 7, **settings})
    ids = run.tokenizer.encode(prompt) or [run.tokenizer.end_of_text]
    steps = stream_text(run.load_model(checkpoint), run.tokenizer, ids, options)
    return [prompt + "".join(pieces) for pieces in zip(*steps, strict=True)]


def expected(runs: Path, prompt: str, checkpoint: str | None = None, **settings: Any) -> list[str]:
    texts = continued(runs, prompt, checkpoint, **settings)
    return [text if text.endswith("\n") else text + "\n" for text in texts]
