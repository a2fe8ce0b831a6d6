"""Small sweeps in a folder of their own, and what they leave."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from minitransformer.analysis import trials
from minitransformer.analysis.search_space import Values
from minitransformer.commands import sweep as command
from minitransformer.tasks import pool
from tests.runs_for_tests import TEXT as LONG_TEXT

ROOT = Path(__file__).parent.parent
SHAPE = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--tokenizer", "bytes"]
SMALL = [
    *SHAPE,
    "--batch-size",
    "2",
    "--warmup-steps",
    "2",
    "--compile",
    "off",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]
TEXT = LONG_TEXT[:2400]
LR, RESIDUAL = Values("lr", (1e-3, 3e-3)), Values("residual", ("pre", "post"))


def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    monkeypatch.setenv("COLUMNS", "80")
    trials._prepared.cache_clear()
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


def trials_in_process(monkeypatch):
    """Trials run here, one after the other, and leave a note; real processes take seconds to start."""
    began = []

    def outcomes(tasks, measure, processes):
        for task in tasks:
            began.append(task)
            yield pool._outcome(measure, task)

    monkeypatch.setattr(pool, "outcomes", outcomes)
    return began


def sweep(*arguments, steps=6):
    return command.main(["gpt-nano", *arguments, "--data", "my.txt", "--steps", str(steps), *SMALL])


def refused(capsys, *arguments):
    """The one sentence that a mistake gets."""
    assert command.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def results(folder):
    """What was measured, each thing once."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in records}) == len(records)
    return records


def weights(run):
    return load_file(run / "checkpoints/latest/model.safetensors")


def assert_same_run(left, right):
    """The same weights, the same validations, the same best checkpoint."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    validations = [
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line]
        for run in (left, right)
    ]
    assert validations[0] == validations[1]
    best = [(run / "checkpoints/best").resolve().name for run in (left, right)]
    assert best[0] == best[1]
