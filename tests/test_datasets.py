"""Kinds of data: an objective brings its own, both are validated on files of their own, and a file is opened whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.errors import UserError
from minitransformer.settings import with_settings
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets import BatchShape, DataRequest, Dataset, Pairs, PlainText, PreparedData
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.loader import Loader
from minitransformer.training.objectives import Objective
from tests.runs_for_tests import configured

LINES = "".join(f"Line {i} counts {i * i}.\n" for i in range(200))
SHAPES = {"conversations": BatchShape(window=128, rows=4)}  # a row holds whole conversations
SHAPE = BatchShape(window=16, rows=4)
TOPOLOGIES = {"text": "decoder", "pairs": "encoder-decoder", "labels": "encoder-classifier", "conversations": "decoder"}
OBJECTIVES = {"text": "causal", "pairs": "seq2seq", "labels": "classify", "conversations": "instruct"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(LINES)
    (tmp_path / "other-text").write_text(LINES[::-1])
    (tmp_path / "pairs.tsv").write_text("".join(f"{i} and one\t{i + 1}\n" for i in range(100)))
    (tmp_path / "other-pairs.tsv").write_text("".join(f"{i} and two\t{i + 2}\n" for i in range(20)))
    for name in ("labels.tsv", "other-labels.tsv"):
        rows = "".join(f"{name} {i}\t{'odd' if i % 2 else 'even'}\n" for i in range(60))
        (tmp_path / name).write_text("text\tlabel\n" + rows)
    for name, count in (("talks.jsonl", 60), ("other-talks.jsonl", 20)):
        rows = "".join(f'{{"prompt": "{name} {i}?", "completion": "{i}"}}\n' for i in range(count))
        (tmp_path / name).write_text(rows)
    return tmp_path


def files_of(kind: str) -> tuple[str, str]:
    of_kind = {"text": ("text", "other-text"), "pairs": ("pairs.tsv", "other-pairs.tsv")}
    of_kind |= {"labels": ("labels.tsv", "other-labels.tsv"), "conversations": ("talks.jsonl", "other-talks.jsonl")}
    return of_kind[kind]


def context_of(kind: str) -> int:
    return 128 if kind == "conversations" else 32


def config_of(kind: str, **changes: Any) -> RunConfig:
    chosen = {"topology": TOPOLOGIES[kind], "objective": OBJECTIVES[kind], "data": files_of(kind)[0]}
    return configured(**{**chosen, "vocab_size": None, "context_length": context_of(kind), **changes})


def texts_in(data: PreparedData, split: str) -> str:
    return data.target_tokenizer.decode(data.targets(split).tolist())


@pytest.mark.parametrize("kind", sorted(Dataset.registry))
def test_files_for_validation_are_all_of_it_whatever_the_data(kind: str) -> None:
    data = config_of(kind, validation_data=files_of(kind)[1]).prepare()
    special = Objective.named(OBJECTIVES[kind]).special_tokens
    request = DataRequest(files_of(kind)[1], Bytes.choose(), context_of(kind), special_tokens=special)
    alone = Dataset.choose(kind).make().prepare_whole(request)
    assert texts_in(data, "validation") == texts_in(alone, "train")
    assert texts_in(data, "train") == texts_in(config_of(kind, validation_fraction=0.0).prepare(), "train")


@pytest.mark.parametrize("kind", sorted(Dataset.registry))
def test_a_whole_file_is_one_split_of_which_every_target_comes_once(kind: str) -> None:
    request = DataRequest(files_of(kind)[0], Bytes.choose(), context_of(kind), tokenizers=[Bytes()])
    data = Dataset.choose(kind).make().prepare_whole(request)
    assert data.num_tokens("validation") == 0
    batches = list(data.ordered_batches("train", SHAPES.get(kind, SHAPE)))
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in batches])
    ordinary = sorted(targets[targets < 256].tolist())
    assert ordinary == sorted(token for token in data.targets("train").tolist() if token < 256)
    assert data.num_bytes("train") == len(ordinary)


@pytest.mark.parametrize("kind", sorted(Dataset.registry))
def test_a_step_is_a_function_of_seed_and_number_alone(kind: str) -> None:
    data, other = config_of(kind).prepare(), config_of(kind).prepare()

    def step(data: PreparedData, seed: int, number: int) -> torch.Tensor:
        return data.shuffled_batches(SHAPES.get(kind, SHAPE), seed, number, lambda batch: batch)[0].targets

    step(data, 0, 9)
    assert torch.equal(step(data, 0, 3), step(other, 0, 3))
    assert not torch.equal(step(data, 0, 3), step(data, 1, 3))


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_an_objective_brings_its_kind_of_data(name: str) -> None:
    topology = sorted(Objective.named(name).topologies)[0]
    config = with_settings(RunConfig(), {"topology": topology, "objective": name})
    assert config.data.dataset.variant is Objective.named(name).dataset
    assert RunConfig(config.model, DataConfig(), TrainingConfig(objective=name)).data.dataset == config.data.dataset


def test_data_that_an_objective_does_not_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="'causal' needs data kind 'text', not 'pairs': leave"):
        RunConfig(data=DataConfig(dataset=Pairs.choose(target_data="x")))
    with pytest.raises(UserError, match="'seq2seq' needs data kind 'pairs', not 'text'"):
        with_settings(config_of("pairs"), {"data_kind": "text"})


def test_with_another_objective_what_was_said_of_pairs_falls_away() -> None:
    pairs = with_settings(config_of("pairs"), {"lowercase": True})
    text = with_settings(pairs, {"objective": "causal", "topology": "decoder"})
    assert text.data.dataset == PlainText.choose()


def test_pairs_that_are_made_up_have_no_whole() -> None:
    data = config_of("pairs", data="numbers", context_length=100).prepare()
    with pytest.raises(UserError, match="numbers generates endless pairs"):
        data.ordered_batches("train", SHAPE)
    assert len(Loader.of_run(config_of("pairs", data="numbers", context_length=100), data).training_batches(5)) == 1
