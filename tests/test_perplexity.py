"""Perplexity of a text in windows that overlap: that of transformers on the same windows."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import evaluate
from minitransformer.runs import Run
from tests.runs_for_tests import TEXT
from tests.test_finetune_public import public

IMPORT: Any = import_module("minitransformer.commands.import")
CONTEXT = 32


@torch.no_grad()
def nats_of_reference(model: Any, ids: torch.Tensor, stride: int) -> float:
    """Of all ids but the first, with the labels -100 that the library's guide to perplexity sets in windows."""
    nats, done, begin = 0.0, 1, 0
    while done < len(ids):
        end = min(begin + CONTEXT + 1, len(ids))
        labels = ids[begin:end].clone()
        labels[: done - begin] = -100
        logits = model(ids[None, begin : end - 1]).logits
        loss = model.loss_function(logits, None, logits.size(-1), shift_labels=labels[None, 1:])
        nats += float(loss) * (end - done)
        done, begin = end, begin + stride
    return nats


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("stride", [5, 16, 32])
def test_perplexity_and_bits_per_byte_of_an_import_are_those_of_transformers(stride: int, here: Path) -> None:
    theirs, text = public("gpt2"), TEXT[:900]
    assert IMPORT.main(["gpt2", "--out", "run"]) == 0
    Path("other.txt").write_text(text)
    flags = ["--data", "other.txt", "--stride", str(stride), "--json", "found.json"]
    assert evaluate.main(["run", *flags]) == 0
    found = json.loads(Path("found.json").read_text())
    tokenizer = Run.open(here / "run").tokenizer
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)])
    nats = nats_of_reference(theirs, ids, stride)
    assert found["stride"] == stride
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
