"""`replay`: repeat the last step of a run that has diverged, and show where its numbers stop being finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from minitransformer.commands import DONE, FAILED, parse, with_exit_code
from minitransformer.training.black_box import TEXT, BlackBox
from minitransformer.training.norms import json_number
from minitransformer.training.replay import Replay, replay
from minitransformer.training.run_machine import machine_again
from minitransformer.training.tracing import Origin

ABOUT = (
    "Repeat the step in a black box, which train.py leaves in its run folder when it ends with exit code 3. The exit "
    "code is 0 if the loss and the gradient norm are as recorded, and 1 if not."
)


@dataclass(frozen=True)
class Options:
    """Which step to repeat, and where."""

    box: tyro.conf.Positional[Path]
    """folder of the black box, such as runs/small-my/black-box"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, …; auto is that of the run, if there is one here"""
    json: bool = False
    """print one JSON object"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Replay a black box; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer replay", description=ABOUT)
    box = BlackBox.open(options.box)
    config, anew = box.config, []
    if options.device != "auto":
        config, anew = replace(config, training=replace(config.training, device=options.device)), ["device"]
    machine, changes = machine_again(box.machine, config, anew)
    done = replay(box, machine)
    print(json.dumps(_to_json(done), indent=2) if options.json else _in_words(done, changes))
    return DONE if done.is_exact or (done.is_close and done.is_elsewhere) else FAILED


def _to_json(done: Replay) -> dict[str, object]:
    box = done.box
    return {
        "box": str(box.path),
        "step": box.step,
        "seed": box.config.training.seed,
        "machine": done.machine.description,
        "recorded_on": box.machine_in_words,
        "recorded": {"loss": _json(box.loss), "grad_norm": _json(box.grad_norm)},
        "replayed": {"loss": _json(done.loss), "grad_norm": _json(done.grad_norm)},
        "is_exact": done.is_exact,
        "forward": None if done.forward is None else done.forward.to_json(),
        "backward": None if done.backward is None else done.backward.to_json(),
    }


def _json(figure: float | None) -> float | str | None:
    return None if figure is None else json_number(figure)


def _in_words(done: Replay, changes: Sequence[str]) -> str:
    box = done.box
    lines = {
        "box": f"{box.path}: step {box.step}, seed {box.config.training.seed}",
        "machine": "; ".join([done.machine.description, *changes]),
        "loss": f"{done.loss:.6g}{_recorded(box.loss)}",
        "gradient": f"norm {done.grad_norm:.6g}{_recorded(box.grad_norm)}",
        "replayed": _verdict(done),
        "forward": "every output is finite" if done.forward is None else _origin(done.forward, "outputs"),
        "backward": _backward(done),
        "text": str(box.path / TEXT),
    }
    return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def _recorded(figure: float | None) -> str:
    return "" if figure is None else f", recorded {figure:.6g}"


def _backward(done: Replay) -> str:
    if done.backward is None:
        return f"every gradient is finite{'' if math.isfinite(done.grad_norm) else ', and their norm overflows'}"
    if done.forward is not None:
        return "gradients are not finite, as outputs are not"
    return _origin(done.backward, "gradients")


def _verdict(done: Replay) -> str:
    if done.box.loss is None:
        return "for the first time: the weights were not finite before it"
    if done.is_exact:
        return "exactly, bit for bit"
    if done.is_elsewhere:
        return f"{'but for rounding' if done.is_close else 'not'}, and it was recorded on {done.box.machine_in_words}"
    return "not: the step does not depend on what is recorded alone, as with faulty hardware"


def _origin(origin: Origin, what: str) -> str:
    lines = [
        f"{origin.module} ({origin.kind}) in micro-batch {origin.micro_batch}, the first with {what} not finite",
        f"inputs     {origin.inputs}",
        f"weights    {origin.weights}",
        f"{what:10} {origin.results}",
    ]
    if origin.gradients is not None:
        lines.insert(3, f"of outputs {origin.gradients}")
    return "\n           ".join(lines)
