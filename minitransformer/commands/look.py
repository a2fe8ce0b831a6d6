"""`look`: an HTML page of attention, predictions and residual norms for a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minitransformer.amounts import size
from minitransformer.analysis.look import look_at
from minitransformer.analysis.look_record import Look, LookRequest
from minitransformer.analysis.viewer import page_of
from minitransformer.commands import DONE, check_outputs, parse, piped_text, with_exit_code
from minitransformer.errors import UserError
from minitransformer.files import write_text
from minitransformer.models.model import Model
from minitransformer.models.recurrent import RecurrentEncoderDecoder
from minitransformer.runs import Run, latest_run
from minitransformer.runs.begin import check_merges
from minitransformer.training.machine import choose_device


@dataclass(frozen=True)
class Options:
    """Which model to inspect, on which text."""

    run: tyro.conf.Positional[Path | None] = None
    """run folder; None is the latest below runs/"""
    prompt: str | None = None
    """input text, with <mask> for an encoder's masks; None reads standard input"""
    target: str | None = None
    """target text of an encoder-decoder (teacher forcing); None is its own greedy output"""
    last: int | None = None
    """keep only this many tokens at the end of the prompt"""
    layers: tuple[int, ...] = ()
    """layers whose attention is shown, counted from 0; none means all"""
    out: Path | None = None
    """output file; None is look.html in the run folder"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    about = "Write an HTML page with a model's attention, predictions and residual norms for a text."
    options = parse(Options, arguments, prog="minitransformer look", description=about)
    check_outputs({"--out": options.out}, new=False)
    run = Run.open(options.run or latest_run())
    prompt = piped_text() if options.prompt is None else options.prompt
    target = None if options.target is None else run.cased(options.target)
    request = LookRequest(run.cased(prompt), target, options.last, options.layers)
    checkpoint = run.checkpoint(options.checkpoint).name
    check_merges(run)
    model = run.load_model(checkpoint, device=str(choose_device(options.device)))
    look = look_at(model, request, run.tokenizer, run.target_tokenizer)
    out = options.out or run.path / "look.html"
    page = page_of(look, f"A look at {run.path.name}", {**_facts(run, model, checkpoint), **_measured(look)})
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another file with --out") from None
    for name, value in {"run": str(run.path), **_measured(look), "page": f"{out} ({size(len(page))})"}.items():
        print(f"{name:12} {value}")
    return DONE


def _facts(run: Run, model: Model, checkpoint: str) -> dict[str, str]:
    config = model.config
    facts = {
        "run": str(run.path),
        "checkpoint": checkpoint,
        "model": f"{config.topology}, {model.num_parameters() / 1e6:.2f}M parameters, d_model {config.d_model}",
    }
    if isinstance(model, RecurrentEncoderDecoder):
        return facts
    return {**facts, "norm placement": f"{config.residual}, {config.norm} norm", "positions": config.positions.name}


def _measured(look: Look) -> dict[str, str]:
    tokens = {"tokens": ", ".join(f"{len(text.tokens)} in the {text.title.lower()}" for text in look.texts.values())}
    losses = look.losses
    if not losses:
        return tokens
    mean = math.fsum(losses) / len(losses)
    return {**tokens, "mean loss": f"{mean:.3f} nats over {len(losses)} tokens (perplexity {math.exp(mean):.3g})"}
