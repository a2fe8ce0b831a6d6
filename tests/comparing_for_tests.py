"""Run folders with numbers of our own, and what `compare` says of them."""

import json
from pathlib import Path

from minitransformer.commands.compare import main
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes, Tokenizer
from tests.runs_for_tests import configured

STEPS = (4, 8, 12)


def run_maker(tmp_path):
    """Makes a run folder with numbers of our own: validation losses at 4, 8 and 12 steps, two tokens and ⅒ s a step."""

    def run(
        name: str,
        losses: tuple[float, ...] = (3.0, 2.0, 1.0),
        *,
        text: str = "text",
        tokenizer: Tokenizer | None = None,
        numbers: tuple[str, ...] = ("validation_loss", "bits_per_byte"),
        **choices: object,
    ) -> Path:
        tokenizer = Bytes() if tokenizer is None else tokenizer
        path = tmp_path / name
        Run.create(path, configured(**choices), tokenizer, tokenizer, text)
        records = []
        for step, loss in zip(STEPS, losses, strict=False):
            records.append({"step": step, "loss": loss + 0.5, "tokens": 2 * step, "seconds": step / 10})
            records.append({"step": step, **dict.fromkeys(numbers, loss), "accuracy": None})
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    return run


def placement_runs(make):
    """Post and pre with five seeds each, of which pre is clearly better."""
    losses = {"post": (2.0, 2.1, 2.2, 2.3, 1.9), "pre": (1.5, 1.61, 1.7, 1.8, 1.4)}
    return [
        make(f"{name}-{seed}", (4.0, 3.0, last), residual=name, seed=seed)
        for name, lasts in losses.items()
        for seed, last in enumerate(lasts)
    ]


def said(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out
