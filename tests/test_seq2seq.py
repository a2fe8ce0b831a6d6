"""Learning from pairs: the loss is the papers', division changes nothing, and a run keeps all that it was told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.commands.train import main
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Readout, build_model
from minitransformer.runs import Run
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets import Pairs
from minitransformer.text.datasets.pair_data import PreparedPairs
from minitransformer.text.pair_batches import PairBatch
from minitransformer.text.tokenizers import Bytes
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.loader import Loader
from minitransformer.training.objectives import Seq2Seq
from minitransformer.training.precision import Precision
from minitransformer.training.validation import validate
from tests.runs_for_tests import configured, reading_learner

PAIRS = [(f"{i} and {i + 1}", f"{2 * i + 1}") for i in range(0, 3000, 7)]
VOCABULARY = 257
CPU = torch.device("cpu")
MODEL = ModelConfig(
    topology="encoder-decoder", d_model=16, num_layers=1, num_heads=2, context_length=32, vocab_size=VOCABULARY
)
TRAINING = TrainingConfig(
    objective="seq2seq",
    **{"steps": 6, "lr": 1e-2, "warmup_steps": 2, "eval_every": 3, "save_every": 2},
    **{"log_every": 1, "precision": "fp32"},
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A small run on pairs of which both sides have many lengths."""
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    data = DataConfig(data="pairs.tsv", tokenizer="bytes", dataset=Pairs.choose(batch_tokens=80))
    return RunConfig(MODEL, data, TRAINING)


@pytest.fixture
def prepared(config: RunConfig) -> PreparedPairs:
    made = config.prepare()
    assert isinstance(made, PreparedPairs)
    return made


class Fixed(nn.Module):
    """A model that gives the logits that it was given, and remembers what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, source: Tensor, inputs: Tensor, source_is_token: Tensor, readout: Readout) -> Any:
        self.asked = source, inputs, source_is_token
        return readout(nn.Identity(), self.logits)


def example(targets: Tensor) -> PairBatch:
    return PairBatch(torch.ones(2, 5).long(), torch.ones(2, 5).bool(), torch.zeros_like(targets), targets)


def objective(label_smoothing: float = 0.0) -> Seq2Seq:
    return Seq2Seq.choose(label_smoothing=label_smoothing).make(Bytes(), MODEL, MODEL.context_length)


@given(smoothing=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 2**32))
def test_smoothing_gives_a_share_to_all_tokens_alike_in_training_only(smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 4), generator=generator)
    targets[1, 2:] = IGNORE
    surprise = -logits.log_softmax(-1)
    real = [(row, place) for row in range(2) for place in range(4) if targets[row, place] != IGNORE]
    plain = sum(surprise[row, place, targets[row, place]] for row, place in real)
    uniform = sum(surprise[row, place].mean() for row, place in real)
    model, batch = Fixed(logits), example(targets)
    smoothed = objective(smoothing).loss_sum(model, batch)
    torch.testing.assert_close(smoothed, (1 - smoothing) * plain + smoothing * uniform)
    score = objective(smoothing).score(model, batch)
    torch.testing.assert_close(score.nats.sum(), plain)
    found = score.items(batch).totals().correct
    assert found == sum(logits[row, place].argmax() == targets[row, place] for row, place in real)


def test_the_model_reads_the_source_its_padding_and_the_targets_before(prepared: PreparedPairs) -> None:
    batch = next(iter(replace(prepared, batch_tokens=60).ordered_batches("validation")))
    model = Fixed(torch.zeros(*batch.targets.shape, VOCABULARY))
    score = objective().score(model, batch)
    assert all(a is b for a, b in zip(model.asked, (batch.source, batch.inputs, batch.source_is_token), strict=True))
    assert score.nats.sum().item() == pytest.approx(batch.num_targets * math.log(VOCABULARY))


@pytest.mark.parametrize("topology", ["encoder-decoder", "rnn"])
def test_micro_batches_give_the_gradient_of_the_batch_that_they_divide(prepared: PreparedPairs, topology: str) -> None:
    batch = max(replace(prepared, batch_tokens=200).ordered_batches("validation"), key=lambda batch: len(batch.source))
    model = build_model(replace(MODEL, topology=topology)).double()
    learner, reader = reading_learner(model, objective(0.1), configured(grad_clip=0.0))
    for parts in ([batch], batch.split(3)):
        learner.step(parts)
    whole, divided = reader.gradients
    assert len(batch.split(3)) > 1
    assert whole.keys() == divided.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(divided[name], gradient, msg=name)


def test_steps_of_several_micro_batches_go_through_every_pair_once_an_epoch(
    config: RunConfig, prepared: PreparedPairs
) -> None:
    config = configured(config, grad_accumulation=3)
    loader = Loader.of_run(config, prepared)
    per_epoch = prepared.training_batches(TRAINING.seed).batches_per_epoch
    batches = [batch for step in range(-(-per_epoch // 3)) for batch in loader.training_batches(step)][:per_epoch]
    assert all(len(loader.training_batches(step)) == 3 for step in range(2))
    assert sum(len(batch.source) for batch in batches) == len(prepared.train)
    rows = [row for batch in batches for row in zip(batch.source, batch.source_is_token, strict=True)]
    assert len({tuple(source[is_token].tolist()) for source, is_token in rows}) == len(prepared.train)


def test_validation_predicts_every_target_once_and_counts_bits_of_target_bytes(
    config: RunConfig, prepared: PreparedPairs
) -> None:
    model = build_model(MODEL)
    loader = Loader.of_run(configured(config, label_smoothing=0.3), prepared)
    result = validate(model, loader, Precision.named("fp32")(CPU))
    nats, count, size = 0.0, 0, 0
    end = prepared.tokenizer.end_of_text
    pairs = prepared.validation
    with torch.no_grad():
        for i in range(len(pairs)):
            source, target = (torch.tensor([[*side[i].tolist(), end]]) for side in (pairs.sources, pairs.targets))
            inputs = torch.cat([torch.tensor([[end]]), target[:, :-1]], dim=1)
            surprise = -model(source, inputs).log_softmax(-1).gather(-1, target[..., None])
            nats, count, size = nats + surprise.sum().item(), count + target.numel(), size + len(pairs.targets[i])
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


# --- as its users meet it

SMALL = [
    *("--topology", "encoder-decoder", "--objective", "seq2seq", "--d-model", "16", "--num-layers", "1"),
    *("--num-heads", "2", "--context-length", "32", "--batch-tokens", "80", "--warmup-steps", "2"),
    *("--compile", "off", "--precision", "fp32", "--steps", "3", "--out", "run"),
]


@pytest.fixture
def parallel(config: RunConfig) -> list[str]:
    """Flags that name two files of lines, which the configuration's folder now has."""
    for name, side in zip(("a.en", "a.de"), zip(*PAIRS, strict=True), strict=True):
        Path(name).write_text("".join(f"{text.upper()}\n" for text in side))
    return ["--data", "a.en", "--target-data", "a.de"]


def test_a_run_with_two_vocabularies_keeps_both_and_resumes(parallel: list[str]) -> None:
    assert main([*SMALL, *parallel, "--tokenizer", "chars", "--separate-vocabularies"]) == 0
    run = Run.open(Path("run"))
    assert b"D" in run.tokenizer.pieces
    assert b"D" not in run.target_tokenizer.pieces
    model = run.load_model().config
    assert (model.vocab_size, model.target_vocab_size) == (run.tokenizer.vocab_size, run.target_tokenizer.vocab_size)
    assert main(["--resume", "run", "--steps", "5"]) == 0
    assert [tokenizer.fingerprint for tokenizer in Run.open(Path("run")).tokenizers] == [
        *(run.tokenizer.fingerprint, run.target_tokenizer.fingerprint)
    ]


def test_lower_case_is_a_property_of_the_run(parallel: list[str]) -> None:
    assert main([*SMALL, *parallel, "--tokenizer", "chars", "--lowercase"]) == 0
    run = Run.open(Path("run"))
    assert run.config.data.dataset.settings.lowercase
    assert {b"d", b"D"} & set(run.tokenizer.pieces) == {b"d"}
    assert not (run.path / "target-tokenizer.json").exists()


def test_files_for_validation_are_all_of_it(parallel: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("v.tsv").write_text("1 AND 2\t3\n4 AND 5\t9\n")
    assert main([*SMALL, *parallel, "--tokenizer", "bytes", "--validation-data", "v.tsv"]) == 0
    assert "validation 2 pairs of 14 and 2 tokens" in capsys.readouterr().out
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss" in record for record in records)


def test_pairs_that_are_too_long_are_counted_aloud(parallel: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    choices = ["--tokenizer", "bytes", "--context-length", "13"]
    long = sum(len(source) > 12 for source, _ in PAIRS)
    assert main([*SMALL, *parallel, *choices]) == 0
    assert f"{long} pairs skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "a.en"], "a.en alone has no pairs"),
        (["--data", "a.en", "--target-data", "short.de"], "429 lines and short.de has 1:"),
        (["--data", "nowhere.tsv"], "no file"),
        (["--data", "pydocs"], "text, not pairs, in recipe 'pydocs'"),
        (["--data", "a.en", "--target-data", "a.de", "--validation-data", "a.en"], "--validation-target-data"),
        (
            ["--data", "a.en", "--target-data", "a.de", "--validation-target-data", "a.de"],
            "but validation_data is missing",
        ),
        (["--data", "numbers", "--validation-data", "pairs.tsv"], "validation_data is 'pairs.tsv', but"),
        (["--data", "a.en", "--target-data", "a.de", "--context-length", "3"], "too long for 3 tokens"),
        (["--data", "a.en", "--target-data", "a.de", "--topology", "decoder"], "choose --objective causal"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_no_run(
    parallel: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("short.de").write_text("eins\n")
    assert main([*SMALL, "--tokenizer", "bytes", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not Path("run").exists()


@pytest.mark.parametrize("flags", [["--target-data"], ["--validation-data", "b.en", "--validation-target-data"]])
def test_files_of_pairs_are_not_left_unread_by_who_learns_from_text(
    parallel: list[str], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["--data", "a.en", *flags, "a.de", "--tokenizer", "bytes", "--compile", "off"]) == 2
    assert "target_data belongs to data_kind 'pairs', and data_kind is 'text': leave it out" in capsys.readouterr().err
    assert not Path("runs").exists()
