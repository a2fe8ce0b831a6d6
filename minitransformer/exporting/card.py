"""The model card of an export: README.md, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.amounts import amount
from minitransformer.exporting.certificate import NAME, Certificate
from minitransformer.exporting.exported import Exported
from minitransformer.records import read_json
from minitransformer.runs import CONFIG, Run
from minitransformer.settings import flat
from minitransformer.text.corpora import short_name

CARD = "README.md"
METRICS = "metrics.jsonl"
UNKNOWN = "unknown"
TAGS = {
    "decoder": "text-generation",
    "encoder": "fill-mask",
    "encoder-classifier": "text-classification",
    "encoder-headless": "feature-extraction",
}
SHOWN = ("steps", "batch_size", "gradient_accumulation", "optimizer", "lr", "schedule", "precision", "seed", "adapter")
NOT_FIGURES = ("step", "validation_tokens")


def write_card(subject: Exported, certificate: Certificate, folder: Path, license: str | None) -> None:
    """Write the card: what the model is, its data, settings, figures, command, licence and limits."""
    files.write_text(folder / CARD, "\n".join(_lines(subject, certificate, license or UNKNOWN)) + "\n")


def _lines(subject: Exported, certificate: Certificate, license: str) -> Iterator[str]:
    run, model = subject.run, subject.model.config
    tag = TAGS.get(model.topology)
    yield from ("---", f"license: {license}", *([f"pipeline_tag: {tag}"] if tag else []))
    yield from ("tags: [minitransformer]", "---", "", f"# {run.path.resolve().name}", "")
    size = amount(subject.model.num_parameters())
    kind = f"An {model.topology}" if model.topology.startswith("e") else f"A {model.topology}"
    yield f"{kind} of {size} parameters, exported by minitransformer from checkpoint {subject.checkpoint}."
    if license == UNKNOWN:
        yield "Nobody has named a licence for it yet."
    yield from ("", "## Data", "", _data(run), "", "## Settings", "")
    yield from _table({name: value for name, value in _settings(run).items() if value is not None})
    if figures := _figures(run.path / METRICS):
        yield from ("", "## Figures", "", f"On the validation split, at step {figures['step']}:", "")
        yield from _table({name: value for name, value in figures.items() if name not in NOT_FIGURES})
    if command := read_json(run.path / CONFIG, "restore it").get("provenance", {}).get("command"):
        yield from ("", "## Command", "", f"    {command}")
    yield from ("", "## Proof", "", f"Opened by {certificate.runtime} and compared with the run ({NAME}):", "")
    yield from _table({check.name: check.found for check in certificate.checks})
    yield from ("", "## Limits", "", *(f"- {limit}" for limit in _limits(subject, certificate)))


def _data(run: Run) -> str:
    data, tokens = run.config.data, f"The tokenizer is {run.tokenizer.name}, with {run.tokenizer.vocab_size:,} tokens."
    source = f"Trained on {short_name(data.data)}." if data.data else "Its training data is not known here."
    parent = f" It started from the weights of {run.parent.path}." if run.parent else ""
    return f"{source}{parent} {tokens}"


def _settings(run: Run) -> dict[str, Any]:
    values = flat(run.config.training) | {"adapter": run.config.model.adapter.name}
    shape = flat(run.config.model)
    names = ("d_model", "num_layers", "num_heads", "context_length", "vocab_size")
    return {name: shape.get(name) for name in names} | {name: values.get(name) for name in SHOWN}


def _figures(path: Path) -> dict[str, Any]:
    """The last validation of a run; empty if it had none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [record for record in map(json.loads, lines) if "validation_loss" in record]
    return {name: value for name, value in found[-1].items() if value is not None} if found else {}


def _limits(subject: Exported, certificate: Certificate) -> Iterator[str]:
    yield f"It attends to at most {subject.model.config.text_length:,} tokens."
    yield "It knows what its data says, errors and prejudices included, and was not tested for harm."
    if subject.template is None:
        yield "It has learned no conversations, and does not follow instructions."
    if not certificate.is_foreign:
        yield "No other program than the one that wrote it has opened this copy."


def _table(values: dict[str, Any]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield f"| {name} | {text.replace('|', chr(92) + '|')} |"
