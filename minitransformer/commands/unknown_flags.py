"""Errors for unknown flags, with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from minitransformer.errors import UserError

ELSEWHERE = {
    "lr": ("learning-rate", "max-lr"),
    "head-lr": ("head-learning-rate",),
    "embedding-lr": ("embedding-learning-rate",),
    "steps": ("max-steps", "max-iters", "iterations", "iters", "epochs", "num-epochs", "num-train-epochs"),
    "context-length": ("block-size", "max-seq-length", "seq-len", "max-length"),
    "max-new-tokens": ("max-seq-length", "max-length", "max-tokens"),
    "d-model": ("n-embd", "hidden-size", "embed-dim"),
    "d-ff": ("intermediate-size",),
    "num-layers": ("num-hidden-layers", "depth"),
    "num-heads": ("num-attention-heads",),
    "num-kv-heads": ("num-key-value-heads",),
    "batch-size": ("per-device-train-batch-size", "micro-batch-size"),
    "grad-accumulation": ("gradient-accumulation-steps",),
    "grad-clip": ("max-grad-norm", "clip"),
    "weight-decay": ("wd",),
    "schedule": ("lr-scheduler-type", "lr-scheduler"),
    "precision": ("dtype", "bf16", "fp16", "fp32", "amp"),
    "device": ("no-cuda", "cpu", "gpu"),
    "data": ("dataset", "train-file", "input", "text"),
    "prompt": ("input", "text"),
    "out": ("output-dir", "out-dir", "output"),
    "to": ("output",),
    "eval-every": ("eval-interval", "eval-steps"),
    "save-every": ("save-interval", "save-steps"),
    "log-every": ("log-interval", "logging-steps"),
    "patience": ("early-stopping-patience",),
    "resume": ("resume-from-checkpoint",),
    "init-from": ("finetune", "finetune-from", "model-name-or-path"),
    "num-samples": ("num-return-sequences",),
    "temperature": ("temp",),
    "num-beams": ("beams",),
}
"""what other libraries call a flag, where that is not similar; the first that the command has is suggested"""


def check_known(options: type[Any], settings: Iterable[str], unknown: Sequence[str]) -> None:
    """Raises `UserError` for the first flag among the `unknown` words, suggesting a known one."""
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        raise UserError(f"unexpected argument {unknown[0]!r}: give it after a flag, as --help shows")
    flag = flag.partition("=")[0]
    nearest = _nearest(flag, [*flag_names(options), *(name.replace("_", "-") for name in settings)])
    remedy = "see --help" if nearest is None else f"did you mean {nearest}?"
    raise UserError(f"there is no flag {flag}: {remedy}")


def _nearest(flag: str, known: Sequence[str]) -> str | None:
    name = flag.removeprefix("--").replace("_", "-").lower()
    found = next((ours for ours, theirs in ELSEWHERE.items() if name in theirs and ours in known), None)
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
