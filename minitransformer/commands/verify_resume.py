"""`verify-resume`: train with and without a stop, and compare bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitransformer.commands import DONE, FAILED, NON_FINITE, with_exit_code
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.commands.train import preset_and_flags, trainable
from minitransformer.errors import UserError
from minitransformer.files import writing
from minitransformer.registry import lookup
from minitransformer.reliability.resume_proof import (
    REASONS,
    ResumeProof,
    changed_run,
    deterministic_cuda,
    new_run,
    prove_resume,
)
from minitransformer.runs import Run
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.presets import PRESETS
from minitransformer.training.ranks import Ranks, joined_ranks, spoken_by_main

PROGRAM = "minitransformer verify-resume [PRESET | RUN]"
ABOUT = (
    "Prove that a run resumes exactly on this machine: train some steps without a stop, and the same steps with a stop "
    "and a resume from disk after half of them, and compare weights, optimizer state, precision state, data and losses "
    "after every step, bit for bit. The exit code is 0 if all are equal, and 1 if not.\n\n"
    "A run continues from its latest checkpoint, in copies: its folder is not written to. The flags of train.py apply, "
    "and torchrun starts several ranks. On CUDA, torch's deterministic algorithms are used."
)
REMEDY = "choose another --folder"


@dataclass(frozen=True)
class Flags:
    """How many steps, and where."""

    steps: int = 6
    """steps to train without a stop; an even number, as the stop comes after half of them"""
    folder: Path | None = None
    """existing folder for the temporary runs; None is the system's own for temporary files"""
    json: bool = False
    """print the result as JSON"""


@spoken_by_main()
@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Compare, in one process or in those that `torchrun` has started; returns the exit code."""
    with joined_ranks() as ranks:
        return ranks.ended(_verify(arguments, ranks))


def _verify(arguments: Sequence[str], ranks: Ranks) -> int:
    name, given = preset_and_flags(arguments)
    run = Run.open(Path(name)) if name not in PRESETS and Path(name).is_dir() else None
    base = run.config if run is not None else lookup("preset", name, PRESETS)
    flags, changed = parse_with_settings(Flags, given, base, prog=PROGRAM, description=ABOUT)
    if flags.steps < 2 or flags.steps % 2:
        raise UserError(f"--steps is {flags.steps}, and half of them come before the stop: give an even number above 0")
    config = trainable(changed, ranks)
    with deterministic_cuda(), _folder(ranks, flags) as folder:
        start = new_run(config, folder / "new", ranks) if run is None else changed_run(run, config, ranks)
        if not flags.json:
            print(_heading(start, name, ranks), flush=True)
        try:
            proof = prove_resume(start, ranks, flags.steps, folder)
        except NonFiniteTraining:
            print("error: this training diverges in these steps: lower its learning rates", file=sys.stderr)
            return NON_FINITE
    print(json.dumps(_as_json(proof, start, ranks)) if flags.json else _in_words(proof))
    return DONE if proof.difference is None else FAILED


@contextmanager
def _folder(ranks: Ranks, flags: Flags) -> Iterator[Path]:
    """A temporary folder, the same on all ranks."""
    with writing(flags.folder or Path(tempfile.gettempdir()), REMEDY):
        folder = Path(ranks.from_main(lambda: tempfile.mkdtemp(prefix="verify-resume-", dir=flags.folder)))
        try:
            yield folder
        finally:
            if ranks.is_main:
                shutil.rmtree(folder)


def _heading(run: Run, name: str, ranks: Ranks) -> str:
    assert run.machine is not None
    machine, training = run.machine, run.config.training
    compiled = "compiled" if machine.compile else "not compiled"
    count = f"{ranks.size} ranks ({training.parallel.name}), each " if ranks.size > 1 else ""
    kind = "run" if name not in PRESETS else "preset"
    return f"{kind:11}{name}\nmachine    {count}{machine.device}, {machine.precision}, {compiled}"


def _in_words(proof: ResumeProof) -> str:
    counts = ", ".join(f"{part} ({count})" for part, count in proof.compared.items() if count)
    lines = [
        f"trained    steps {proof.first + 1} to {proof.last}, without a stop and with one after step {proof.stop}",
        f"compared   bit for bit, after each step: {counts}",
    ]
    if (found := proof.difference) is None:
        return "\n".join([*lines, "result     equal"])
    where = f"step {found.step}, {found.when}" + (f", on rank {found.rank}" if found.rank else "")
    lines += [f"result     different, first at {where}: {REASONS[found.when]}"]
    return "\n".join([*lines, *(f"{part.part:16} {part}" for part in found.parts)])


def _as_json(proof: ResumeProof, run: Run, ranks: Ranks) -> dict[str, Any]:
    assert run.machine is not None
    return {"equal": proof.difference is None, "ranks": ranks.size, "machine": run.machine.to_json(), **asdict(proof)}
