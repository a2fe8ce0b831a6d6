"""Small sweeps in a folder of their own, and what they leave."""

import json
from pathlib import Path

from minitransformer.analysis.search_space import Values
from minitransformer.commands import sweep as command
from tests.runs_for_tests import SMALL as SMALL_RUN
from tests.runs_for_tests import TEXT as LONG_TEXT
from tests.runs_for_tests import assert_same_weights, saved_weights
from tests.runs_for_tests import refused as refused_by

ROOT = Path(__file__).parent.parent
SMALL = [*SMALL_RUN, "--device", "cpu"]
TEXT = LONG_TEXT[:2400]
LR, RESIDUAL = Values("lr", (1e-3, 3e-3)), Values("residual", ("pre", "post"))


def sweep(*arguments, steps=6):
    return command.main(["gpt-nano", *arguments, "--data", "my.txt", "--steps", str(steps), *SMALL])


def refused(capsys, *arguments):
    """The one sentence that a mistake gets."""
    return refused_by(capsys, *arguments, main=command.main)


def results(folder):
    """What was measured, each thing once."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in records}) == len(records)
    return records


def assert_same_run(left, right):
    """The same weights, the same validations, the same best checkpoint."""
    assert_same_weights(saved_weights(left), saved_weights(right))
    validations = [
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line]
        for run in (left, right)
    ]
    assert validations[0] == validations[1]
    best = [(run / "checkpoints/best").resolve().name for run in (left, right)]
    assert best[0] == best[1]
