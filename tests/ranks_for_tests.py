"""Runs of every kind, and other measurements, on several ranks; torchrun itself is tried in `test_lost_ranks.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from minitransformer.models.model import build_model
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.learner import Learner, build_learner
from minitransformer.training.ranks import Ranks, joined_ranks
from minitransformer.training.validation import validate
from tests.forked_for_tests import forked_commands
from tests.runs_for_tests import configured, cpu

STEPS = 50
PAIRS = {"objective": "seq2seq", "data": "pairs.tsv", "batch_tokens": 90}  # batches of three rows and more
# AdamW's normalised steps make noise of gradients that are nearly 0, which a usual ε lets grow tenfold a step.
STEADY: dict[str, Any] = {"eps": 1e-4, "dropout": 0.1, "grad_accumulation": 2, "batch_size": 6, "steps": STEPS}
CASES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "muon": {"optimizer": "muon"},
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "five rows": {"batch_size": 5, "grad_accumulation": 1},
    "fewer rows than ranks": {"batch_size": 1},
    "masked": {"objective": "masked", "topology": "encoder"},
    "next sentence": {
        "objective": "masked",
        "topology": "encoder",
        "next_sentence": True,
        "num_segments": 2,
        "batch_size": 3,
    },
    "span-corruption": {"objective": "span-corruption", "topology": "encoder-decoder", "context_length": 32},
    "pairs": {**PAIRS, "topology": "encoder-decoder"},
    "recurrent": {**PAIRS, "topology": "rnn"},
    "classes": {"objective": "classify", "topology": "encoder-classifier", "data": "labels.tsv", "batch_tokens": 90},
    "classes of a decoder": {
        **{"objective": "classify", "topology": "decoder-classifier", "data": "labels.tsv", "batch_tokens": 90},
        **{"class_weights": "balanced", "eps": 1e-2},
    },
    "answers": {"objective": "instruct", "data": "talks.jsonl", "context_length": 64, "batch_size": 3},
    "shards": {"data": "index.json", "batch_size": 5},
    "bf16": {"precision": "bf16"},
    "distilled": {"teacher": "another model", "num_experts": 4},
    "recomputed": {"activation_checkpointing": True, "num_experts": 4, "optimizer": "muon"},
}

TENSOR: dict[str, dict[str, Any]] = {
    "heads and features": {"qk_norm": "head", "value_norm": True, "bias": True, "feedforward": "swiglu", "eps": 1e-2},
    "shared heads": {"num_heads": 4, "num_kv_heads": 2, "norm": "rms", "activation_checkpointing": True},
    "memory": {**PAIRS, "topology": "encoder-decoder"},
    "two rows": {"batch_size": 1, "block": "parallel", "tied_embeddings": False},
}
"""runs in which pairs of ranks share matrices"""


def config_of(name: str, folder: Path, **choices: Any) -> RunConfig:
    """The configuration of the case `name`, on the texts in `folder`."""
    case = {**TENSOR[name], "dropout": 0.0} if name in TENSOR else CASES[name]
    wanted = {"data": "text.txt", "validation_fraction": 0.2, **STEADY, **case, **choices}
    if "optimizer" not in wanted and case.get("precision") == "bf16":
        wanted["eps"] = 1e-2
    return configured(**{**wanted, "data": str(folder / wanted["data"]), "vocab_size": None})


def learner_of(config: RunConfig, ranks: Ranks) -> Learner:
    prepared = config.prepare()
    model = with_vocabulary(config.model, prepared)
    torch.manual_seed(1)
    teacher = None if config.training.teacher is None else build_model(replace(model, num_experts=None))
    config = RunConfig(model, config.data, config.training)
    return build_learner(config, prepared, cpu(config.training.precision), ranks, teacher=teacher)


def trained(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Losses, gradient norms, the metrics of the last validation, and the sum of each weight."""
    learner = learner_of(config, ranks)
    results = [learner.step(learner.next_batches()) for _ in range(config.training.steps)]
    validation = validate(learner.model, learner.loader, learner.precision, ranks=learner.ranks)
    return {
        "losses": [result.loss.item() for result in results],
        "grad_norms": [float(result.grad_norm) for result in results],
        "validation": {name: value for name, value in validation.values.items() if value is not None},
        "tokens": validation.tokens,
    }


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("".join(f"{i} the quick brown fox counts {i * i}.\n" for i in range(200)))
    for name, number in (("a", 60), ("b", 90)):
        (folder / f"{name}.txt").write_text("".join(f"{i} lazy dogs of shard {name}.\n" for i in range(number)))
    (folder / "index.json").write_text('{"shards": ["text.txt", {"path": "a.txt"}], "validation": ["b.txt"]}')
    rows = "".join(f"{i} is a number\t{'odd' if i % 2 else 'even' if i % 3 else 'six'}\n" for i in range(200))
    (folder / "labels.tsv").write_text("text\tlabel\n" + rows)
    talks = ({"prompt": f"{i} times {i % 7}?", "completion": str(i * (i % 7))} for i in range(200))
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (folder / "pairs.tsv").write_text("".join(f"{i} times {i % 7}\t{i * (i % 7)}\n" for i in range(200)))


def on_ranks(
    count: int, folder: Path, *names: str, parallel: str = "ddp", module: str = "tests.ranks_for_tests"
) -> dict[str, Any]:
    """What rank 0 of `count` ranks found by `measured` of `module`."""
    ended = forked_commands(print_measured)(folder, module, parallel, *names, ranks=count, patience=300)
    assert ended.done, ended.output[-3000:]
    measured: dict[str, Any] = json.loads(ended.outputs[0].splitlines()[-1])
    return measured


def print_measured(module: str, arguments: Sequence[str]) -> int:
    """On each rank, in the folder with the texts."""
    with joined_ranks(timeout=60) as ranks:
        found = import_module(module).measured(Path.cwd(), ranks, *arguments)
        if ranks.is_main:
            print(json.dumps(found))
    return 0


def measured(folder: Path, ranks: Ranks, parallel: str, *names: str) -> dict[str, Any]:
    """The cases `names`, where `parallel` may also be "tensor"."""
    choices = {"parallel": "fsdp", "tensor_parallel": 2} if parallel == "tensor" else {"parallel": parallel}
    return {name: trained(config_of(name, folder, **choices), ranks) for name in names}
