"""Errors for unknown flags, with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from minitransformer.errors import UserError

# Names in other libraries that are not similar. Of several flags, the first that the command has is suggested.
ELSEWHERE = {
    "learning-rate": ("lr",),
    "max-lr": ("lr",),
    "head-learning-rate": ("head-lr",),
    "embedding-learning-rate": ("embedding-lr",),
    "max-steps": ("steps",),
    "max-iters": ("steps",),
    "iterations": ("steps",),
    "iters": ("steps",),
    "epochs": ("steps",),
    "num-epochs": ("steps",),
    "num-train-epochs": ("steps",),
    "block-size": ("context-length",),
    "max-seq-length": ("context-length", "max-new-tokens"),
    "seq-len": ("context-length",),
    "max-length": ("context-length", "max-new-tokens"),
    "max-tokens": ("max-new-tokens",),
    "n-embd": ("d-model",),
    "hidden-size": ("d-model",),
    "embed-dim": ("d-model",),
    "intermediate-size": ("d-ff",),
    "num-hidden-layers": ("num-layers",),
    "depth": ("num-layers",),
    "num-attention-heads": ("num-heads",),
    "num-key-value-heads": ("num-kv-heads",),
    "per-device-train-batch-size": ("batch-size",),
    "micro-batch-size": ("batch-size",),
    "gradient-accumulation-steps": ("grad-accumulation",),
    "max-grad-norm": ("grad-clip",),
    "clip": ("grad-clip",),
    "wd": ("weight-decay",),
    "lr-scheduler-type": ("schedule",),
    "lr-scheduler": ("schedule",),
    "dtype": ("precision",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "fp32": ("precision",),
    "amp": ("precision",),
    "no-cuda": ("device",),
    "cpu": ("device",),
    "gpu": ("device",),
    "dataset": ("data",),
    "train-file": ("data",),
    "input": ("data", "prompt"),
    "text": ("data", "prompt"),
    "output-dir": ("out",),
    "out-dir": ("out",),
    "output": ("out", "to"),
    "eval-interval": ("eval-every",),
    "eval-steps": ("eval-every",),
    "save-interval": ("save-every",),
    "save-steps": ("save-every",),
    "log-interval": ("log-every",),
    "logging-steps": ("log-every",),
    "early-stopping-patience": ("patience",),
    "resume-from-checkpoint": ("resume",),
    "finetune": ("init-from",),
    "finetune-from": ("init-from",),
    "model-name-or-path": ("init-from",),
    "num-return-sequences": ("num-samples",),
    "temp": ("temperature",),
    "beams": ("num-beams",),
}


def check_known(options: type[Any], settings: Iterable[str], unknown: Sequence[str]) -> None:
    """Raises `UserError` for the first flag among the `unknown` words, suggesting a known one."""
    if not unknown:
        return
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        raise UserError(f"unexpected argument {unknown[0]!r}: give it after a flag, as --help shows")
    flag = flag.partition("=")[0]
    nearest = _nearest(flag, [*flag_names(options), *(name.replace("_", "-") for name in settings)])
    remedy = "see --help" if nearest is None else f"did you mean {nearest}?"
    raise UserError(f"there is no flag {flag}: {remedy}")


def _nearest(flag: str, known: Sequence[str]) -> str | None:
    name = flag.removeprefix("--").replace("_", "-").lower()
    found = next((other for other in ELSEWHERE.get(name, ()) if other in known), None)
    if found is None:
        found = next(iter(get_close_matches(name, known, n=1, cutoff=0.6)), None)
    if found is None:
        found = next((other for other in known if name in other.split("-")), None)
    return None if found is None else f"--{found}"


def flag_names(options: type[Any]) -> Iterator[str]:
    """The flags of a dataclass and of nested ones, without dashes."""
    hints = get_type_hints(options)
    for field in fields(options):
        if is_dataclass(kind := hints[field.name]):
            yield from flag_names(kind)  # type: ignore[arg-type]
        else:
            yield field.name.replace("_", "-")
            if kind is bool:
                yield f"no-{field.name.replace('_', '-')}"
