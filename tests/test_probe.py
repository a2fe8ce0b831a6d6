"""Probes of training: what they write down is true, and the run does not notice them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.block import Block
from minitransformer.commands.train import main
from minitransformer.diagnostics import Diagnostic, check_probe, probe_for
from minitransformer.diagnostics import probe as probe_now
from minitransformer.models.model import build_model
from minitransformer.text.batches import IGNORE
from minitransformer.text.pair_batches import PairBatch
from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.config import RunConfig
from minitransformer.training.logging import TensorBoard, Terminal
from minitransformer.training.loop import Trainer
from minitransformer.training.objectives.seq2seq import pair_loss
from minitransformer.training.probe import NO_PROBE
from minitransformer.training.signals import StopRequest
from tests.runs_for_tests import TEXT, TINY, call_after_step, configured, trainer_for, weights_after

ALL = tuple(Diagnostic.registry)


def probed_trainer(path: Path, text: Any, config: RunConfig, stop: StopRequest | None = None, at: int = 0) -> Trainer:
    return trainer_for(path, text, config, stop, resume_at=at, make_probe=probe_for(config.training))


def step_of(trainer: Trainer) -> dict[str, float | None]:
    """What the next step measures, without the prefix of its keys."""
    learner = trainer.learner
    measured = learner.step(learner.next_batches()).measured
    return {key.removeprefix("probe/"): value for key, value in measured.items()}


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of measured steps, without the prefix of their keys."""
    for line in (path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if any(key.startswith("probe/") for key in record):
            yield {key.removeprefix("probe/"): value for key, value in record.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("choices", [{}, {"num_experts": 2}, {"grad_accumulation": 2, "residual": "residual"}], ids=str)
def test_a_run_with_every_diagnostic_ends_with_the_same_weights(text: Any, tmp_path: Path, choices: Any) -> None:
    config = configured(dropout=0.3, steps=5, **choices)
    plain = trainer_for(tmp_path / "plain", text, config)
    plain.train()
    probed = probed_trainer(tmp_path / "probed", text, configured(config, probe=ALL, probe_every=2))
    probed.train()
    assert same(weights_after(plain), weights_after(probed))
    assert plain.progress.best_loss == probed.progress.best_loss


def test_the_random_state_after_a_measured_step_is_that_of_another(text: Any, tmp_path: Path) -> None:
    config = configured(dropout=0.3)
    states = []
    for number, names in enumerate([(), ALL]):
        step_of(probed_trainer(tmp_path / str(number), text, configured(config, probe=names)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_probed_run_that_is_resumed_ends_as_if_it_had_not_been_interrupted(text: Any, tmp_path: Path) -> None:
    config = configured(dropout=0.3, probe=ALL, probe_every=3, steps=10)
    whole = probed_trainer(tmp_path / "whole", text, config)
    whole.train()
    stop = StopRequest()
    first = probed_trainer(tmp_path / "parts", text, config, stop)
    call_after_step(first, 7, lambda: setattr(stop, "signal", signal.SIGINT))
    first.train()
    second = probed_trainer(tmp_path / "parts", text, config, at=7)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    assert same(weights_after(whole), weights_after(second))
    assert list(records(tmp_path / "whole")) == list(records(tmp_path / "parts"))


def test_without_names_there_is_no_probe_and_no_hook(text: Any, tmp_path: Path) -> None:
    trainer = probed_trainer(tmp_path / "run", text, TINY)
    assert trainer.learner.probe is NO_PROBE
    trainer.train()
    for block in (module for module in trainer.learner.model.modules() if isinstance(module, Block)):
        for module in block.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    assert not list(records(tmp_path / "run"))


def test_the_first_step_and_every_second_one_are_measured(text: Any, tmp_path: Path) -> None:
    names = ("gradient-norm", "stream-variance", "gradient-spikes")
    probed_trainer(tmp_path / "run", text, configured(steps=6, probe=names, probe_every=2)).train()
    found = list(records(tmp_path / "run"))
    assert [record["step"] for record in found] == [1, 2, 4, 6]
    layers = [f"stack.{layer}" for layer in range(2)]
    assert set(found[0]) == {
        "step",
        "stream-variance/stack.input",
        "gradient-spikes",
        *(f"stream-variance/{layer}" for layer in layers),
        *(f"gradient-norm/{layer}.{sublayer}" for layer in layers for sublayer in ("attention", "feedforward")),
    }


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_norm_of_a_step_is_that_of_its_loss_over_all_micro_batches(
    text: Any, tmp_path: Path, accumulation: int
) -> None:
    config = configured(probe=("gradient-norm",), grad_accumulation=accumulation, grad_clip=1e-3)
    trainer = probed_trainer(tmp_path / "run", text, config)
    batches = trainer.learner.loader.training_batches(0)
    targets = sum(batch.num_targets for batch in batches)
    loss = sum(trainer.learner.objective.loss_sum(trainer.learner.model, batch) for batch in batches) / targets
    loss.backward()  # type: ignore[union-attr]
    expected = {}
    for layer, block in enumerate(trainer.learner.model.stack.blocks):  # type: ignore[union-attr, arg-type]
        for name in ("attention", "feedforward"):
            gradients = [p.grad.numpy().ravel() for p in getattr(block, name).parameters()]
            expected[f"gradient-norm/stack.{layer}.{name}"] = float(np.linalg.norm(np.concatenate(gradients)))
    trainer.learner.model.zero_grad()
    assert step_of(trainer) == pytest.approx(expected, rel=1e-4)


def test_the_update_ratio_is_how_far_the_weights_have_moved(text: Any, tmp_path: Path) -> None:
    trainer = probed_trainer(tmp_path / "run", text, configured(probe=("update-ratio",)))
    before = weights_after(trainer)
    measured = step_of(trainer)
    after = weights_after(trainer)
    names = [name for name in before if name.startswith("stack.blocks.1.feedforward.")]
    old, new = (np.concatenate([weights[name].numpy().ravel() for name in names]) for weights in (before, after))
    found = measured["update-ratio/stack.1.feedforward"]
    assert found == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5)
    assert found > 0


def test_figures_at_rest_are_for_the_weights_and_in_the_unit_of_the_loss(text: Any, tmp_path: Path) -> None:
    names = ("stream-variance", "skipped-layer", "example-gradient-norm")
    trainer = probed_trainer(tmp_path / "run", text, configured(batch_size=16, dropout=0.5, probe=names))
    rows: Any = trainer.learner.loader.training_batches(0)[0]

    def mean_loss(batch: Any) -> Tensor:
        return trainer.learner.objective.loss_sum(trainer.learner.model, batch) / batch.num_targets

    examples = [partial(mean_loss, row) for row in rows.split(1)[:2]]  # an eighth of the batch
    expected = probe_now(trainer.learner.model, lambda: mean_loss(rows.split(2)[0]), names, examples=examples)
    trainer.learner.model.train()
    del expected["skipped-layer/stack.1"]  # a run skips one layer at a time
    assert step_of(trainer) == expected


def test_a_run_skips_one_layer_at_a_time_and_all_in_turn(text: Any, tmp_path: Path) -> None:
    config = configured(num_layers=3, probe=("skipped-layer",), probe_every=2, steps=6, lr=1e-9)
    trainer = probed_trainer(tmp_path / "run", text, config)
    trainer.train()
    at_once = [set(record) - {"step"} for record in records(tmp_path / "run")]
    assert [len(places) for places in at_once] == [1, 1, 1, 1]
    assert set.union(*at_once[1:]) == {f"skipped-layer/stack.{layer}" for layer in range(3)}


def test_padding_of_targets_changes_no_figure() -> None:
    torch.manual_seed(0)
    model = build_model(replace(TINY.model, topology="encoder-decoder", vocab_size=20)).eval()
    source, targets = torch.randint(20, (2, 7)), torch.randint(20, (2, 6))
    source_is_token = torch.ones_like(source, dtype=torch.bool)
    plain = PairBatch(source, source_is_token, targets.roll(1, dims=1), targets)
    padded = PairBatch(source, source_is_token, F.pad(plain.inputs, (0, 4)), F.pad(targets, (0, 4), value=IGNORE))
    names = [name for name in ALL if name != "fp16-margin"]  # padding overflows too

    def figures(batch: PairBatch) -> dict[str, float | None]:
        objective = SimpleNamespace(loss_sum=lambda model, batch: pair_loss(model, batch, 0.0))
        loader: Any = SimpleNamespace(training_batches=lambda step: [batch], objective=objective)
        training = replace(TINY.training, probe=tuple(names))
        probe: Any = probe_for(training)(model, loader, torch.device("cpu"))
        probe.share = 1
        probe.before_step(1)
        return probe._figures

    assert any(name.startswith("attention-entropy/decoder") for name in figures(plain))
    assert figures(padded) == pytest.approx(figures(plain), rel=1e-4, abs=1e-6)


def test_spikes_are_counted_between_measurements(text: Any, tmp_path: Path) -> None:
    config = configured(probe=("gradient-spikes",), probe_every=5, steps=30, lr=1e-6, eval_every=30, save_every=30)
    trainer = probed_trainer(tmp_path / "run", text, config)
    loss_sum = trainer.learner.objective.loss_sum

    def louder(model: nn.Module, batch: Any) -> Tensor:
        return loss_sum(model, batch) * (100 if trainer.progress.step in (21, 22, 27) else 1)

    trainer.learner.objective.loss_sum = louder  # type: ignore[method-assign]
    trainer.train()
    counts = {record["step"]: record["gradient-spikes"] for record in records(tmp_path / "run")}
    assert counts == {1: 0, 5: 0, 10: 0, 15: 0, 20: 0, 25: 2, 30: 1}


def test_only_training_passes_go_through_the_compiled_model(text: Any, tmp_path: Path) -> None:
    passes = []
    trainer = probed_trainer(tmp_path / "run", text, configured(probe=ALL, probe_every=1, grad_accumulation=2))

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = trainer.learner.model

        def forward(self, tokens: Tensor, **options: Any) -> Tensor:
            passes.append(self.model.training)
            return self.model(tokens, **options)

    trainer.learner.fast_model = Compiled()
    trainer.learner.model.train()
    for _ in range(3):
        step_of(trainer)
    assert passes == [True] * 6


def test_a_pipe_shows_no_figures_and_tensorboard_no_missing_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Terminal(steps=1, done=0).record({"step": 1, "probe/gradient-norm/stack.0.attention": 1.0})
    assert capsys.readouterr().out == ""
    pytest.importorskip("tensorboard")
    log = TensorBoard(tmp_path)
    log.record({"step": 1, "probe/gradient-norm/stack.0.attention": 1.0, "probe/fp16-margin/stack.0": None})
    log.close()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--probe", "gradient-norms"], "unknown diagnostic 'gradient-norms': did you mean 'gradient-norm'?"),
        (["rnn-attention", "--probe", "gradient-norm"], "topology 'rnn' has none: leave --probe out"),
        (["--probe-every", "0"], "probe_every is 0: it must be at least 1"),
    ],
)
def test_a_probe_that_cannot_be_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], answer: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1


def test_the_command_line_switches_diagnostics_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    Path("my.txt").write_text(TEXT)
    shape = ["--d-model=16", "--num-layers=1", "--num-heads=2", "--context-length=16", "--batch-size=2"]
    how = ["--data=my.txt", "--tokenizer=bytes", "--steps=4", "--compile=off", "--precision=fp32", "--out=run"]
    names = ["--probe-every=2", "--probe", "gradient-norm", "attention-entropy"]
    assert main([*shape, *how, *names]) == 0
    found = list(records(tmp_path / "run"))
    assert [record["step"] for record in found] == [1, 2, 4]
    assert all(record["attention-entropy/stack.0.attention"] > 0 for record in found)
    assert main(["--resume=run", "--steps=6"]) == 0
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 4, 6]


def test_every_diagnostic_is_known_on_the_command_line() -> None:
    check_probe(configured(probe=ALL))
