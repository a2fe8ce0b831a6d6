"""How much of the validation split is read how often: what is drawn, what it says, and what is told of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.models.model import build_model
from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.config import RunConfig, TrainingConfig, with_vocabulary
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Log, Terminal
from minitransformer.training.objectives import Objective
from minitransformer.training.precision import Precision
from minitransformer.training.signals import StopRequest
from minitransformer.training.validation import LEAST, Validator, draw_subset, most_tokens, validate
from tests.runs_for_tests import configured, cpu, prepared_text, trainer_for, validation_of

pytestmark = pytest.mark.unchecked_shapes

FP32 = Precision.named("fp32")(torch.device("cpu"))
TOPOLOGIES = {
    "causal": "decoder",
    "masked": "encoder",
    "span-corruption": "encoder-decoder",
    "seq2seq": "rnn",
    "classify": "decoder-classifier",
    "instruct": "decoder",
}


def run_of(name: str, folder: Path, **choices: object) -> tuple[RunConfig, Loader]:
    """With a validation split of some dozens of batches."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("".join(f"{i} the quick brown fox counts {i * i}.\n" for i in range(600)))
    (folder / "pairs.tsv").write_text("".join(f"{i} times {i % 7}\t{i * (i % 7)}\n" for i in range(600)))
    rows = "".join(f"{i} times {i % 7}\t{'odd' if i * (i % 7) % 2 else 'even'}\n" for i in range(600))
    (folder / "labels.tsv").write_text("text\tlabel\n" + rows)
    talks = ({"prompt": f"{i} times {i % 7}?", "completion": str(i * (i % 7))} for i in range(600))
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    data = folder / {"seq2seq": "pairs.tsv", "classify": "labels.tsv", "instruct": "talks.jsonl"}.get(name, "text.txt")
    config = configured(
        **{"data": str(data), "objective": name, "topology": TOPOLOGIES[name], "context_length": 32},
        **{
            "vocab_size": None,
            "validation_fraction": 0.2,
        },
        **({"batch_tokens": 64} if name in ("seq2seq", "classify") else {}),
        **{"validation_tokens": 512, "num_layers": 1, **choices},
    )
    prepared = config.prepare()
    config = replace(config, model=with_vocabulary(config.model, prepared))
    return config, Loader.of_run(config, prepared)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_every_objective_reads_the_same_part_each_time_and_all_at_the_end(name, work):
    config, loader = run_of(name, work)
    model = build_model(config.model)
    validator = Validator(Learner(config, model, loader, cpu("fp32")), Log(), StopRequest())
    assert validator.subset is not None
    assert 512 <= validator.subset.tokens <= 2 * 512
    first, again, whole = validator(whole=False), validator(whole=False), validator(whole=True)
    assert first == again
    assert first.tokens == validator.subset.tokens < whole.tokens
    assert whole.subset_loss == pytest.approx(first.loss, rel=1e-6)
    assert whole.comparable_loss == whole.subset_loss
    assert first.comparable_loss == first.loss
    alone = validate(model, loader, FP32)
    assert whole.values == alone.values
    assert alone.subset_loss is None


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_bits_per_byte_of_a_part_are_over_the_bytes_of_its_own_targets(name, work):
    config, loader = run_of(name, work)
    model, subset = build_model(config.model), draw_subset(config, loader)
    batches = [loader.validation_batches().batch(index) for index in subset.batches]
    size = sum(int(((batch.targets >= 0) & (batch.targets < 256)).sum()) for batch in batches)
    result = validate(model, loader, FP32, subset, whole=False)
    nats = sum(loader.objective.score(model, batch).nats.sum().item() for batch in batches)
    assert result.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-3)


def test_validation_predicts_every_token_once_and_counts_bits_of_bytes(tmp_path):
    text = prepared_text(tmp_path)
    trainer = trainer_for(tmp_path / "run", text, configured())
    result = validate(trainer.learner.model, trainer.learner.loader, trainer.learner.precision)
    tokens = torch.from_numpy(text.validation.astype("int64"))
    nats = count = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        log_p = trainer.learner.model.eval()(window[None, :-1]).double().log_softmax(-1)[0]
        nats -= log_p.gather(1, window[1:, None]).sum().item()
        count += len(window) - 1
    assert count == len(tokens) - 1
    assert result.loss == pytest.approx(nats / count, rel=1e-6)
    assert result.values["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert result.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / text.validation_bytes, rel=1e-6)


@given(seed=st.integers(0, 99), tokens=st.integers(1, 4000))
def test_what_is_drawn_is_spread_over_the_split_and_depends_on_the_seed_alone(tmp_path_factory, seed, tokens):
    config, loader = causal(tmp_path_factory, seed=seed, validation_tokens=tokens)
    subset, again = draw_subset(config, loader), draw_subset(config, loader)
    assert subset == again
    count = len(loader.validation_batches())
    if subset is None:
        assert tokens > loader.validation_tokens * (count - 1) / count
        return
    assert sorted(set(subset.batches)) == list(subset.batches)
    places = [0, *subset.batches, count]
    assert max(b - a for a, b in pairwise(places)) <= 2 * math.ceil(count / len(subset.batches))


TEXTS = {}


def causal(tmp_path_factory, **choices):
    if "causal" not in TEXTS:
        TEXTS["causal"] = prepared_text(tmp_path_factory.mktemp("long"), "A line of text that is long enough.\n" * 900)
    config = configured(**choices)
    return config, Loader.of_run(config, TEXTS["causal"])


def test_two_seeds_read_other_parts(tmp_path_factory):
    one, other = (draw_subset(*causal(tmp_path_factory, seed=seed, validation_tokens=500)) for seed in (1, 2))
    assert one.batches != other.batches


@pytest.mark.parametrize(
    ("choices", "most"),
    [
        ({"eval_every": 250, "batch_size": 64, "context_length": 32}, 51_200),
        ({"eval_every": 1}, LEAST),
        ({"validation_tokens": 0}, None),
        ({"validation_tokens": 100}, 100),
    ],
)
def test_a_tenth_of_what_is_trained_on_in_between_is_read_unless_told_otherwise(choices, most):
    assert most_tokens(configured(**choices)) == most


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(UserError, match="validation_tokens is -1"):
        TrainingConfig(validation_tokens=-1)


def test_a_small_split_is_read_whole_each_time(tmp_path):
    text = prepared_text(tmp_path)
    assert len(text.validation) < LEAST
    trainer = trainer_for(tmp_path / "run", text, configured())
    assert trainer.validator.subset is None
    assert str(trainer.validator) == ""


def capped(**choices: object) -> RunConfig:
    return configured(**{"validation_tokens": 200, "eval_every": 2, "steps": 8, **choices})


def records(path: Path) -> list[dict]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "validation_loss" in record]


def test_the_last_validation_is_whole_and_the_best_one_is_told_by_what_all_have_read(tmp_path):
    text = prepared_text(tmp_path)
    trainer = trainer_for(tmp_path / "run", text, capped())
    trainer.train()
    read = [record["validation_tokens"] for record in records(tmp_path / "run")]
    assert read[:3] == [trainer.validator.subset.tokens] * 3
    assert read[3] >= len(text.validation) - 1
    assert (
        trainer.validation.loss
        == validate(trainer.learner.model, trainer.learner.loader, trainer.learner.precision).loss
    )
    assert trainer.progress.best_step == 8
    assert trainer.progress.best_loss == trainer.validation.subset_loss != trainer.validation.loss


def test_the_validation_that_ends_a_run_early_is_whole(tmp_path):
    text = prepared_text(tmp_path)
    trainer = trainer_for(tmp_path / "run", text, capped(steps=100, patience=2))
    made, losses = trainer.validator, iter([3.0, 2.0, 2.5, 2.1])

    class Losses:
        subset = made.subset
        seconds_left = made.seconds_left

        def __call__(self, *, whole):
            return validation_of(9.0, subset_loss=2.1) if whole else validation_of(next(losses))

    trainer.validator = Losses()
    trainer.train()
    assert trainer.stopped_early
    assert (trainer.progress.step, trainer.progress.best_step, trainer.progress.best_loss) == (8, 4, 2.0)
    assert [record["validation_loss"] for record in records(tmp_path / "run")] == [3.0, 2.0, 2.5, 9.0]


def test_a_resumed_run_reads_the_same_part(tmp_path):
    text = prepared_text(tmp_path)
    whole = trainer_for(tmp_path / "whole", text, capped())
    whole.train()
    first = trainer_for(tmp_path / "parts", text, capped())
    first.train(until=5)
    second = trainer_for(tmp_path / "parts", text, capped(), resume_at=5)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    assert second.validator.subset == whole.validator.subset
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert second.progress.best_loss == whole.progress.best_loss


def test_the_time_left_counts_the_validations_to_come(tmp_path):
    text = prepared_text(tmp_path)
    trainer = trainer_for(tmp_path / "run", text, capped())
    part, whole = trainer.validator.subset.tokens, trainer.validator.tokens
    config = trainer.learner.config
    # Before the first one, from the speed of training.
    assert trainer.validator.seconds_left(1, config, 100.0) == pytest.approx((3 * part + whole) / 300)
    trainer.validator._seconds_per_token = 0.5
    assert trainer.validator.seconds_left(4, config, 100.0) == pytest.approx((2 * part + whole) / 2)
    assert trainer.validator.seconds_left(5, config, 100.0) == pytest.approx((part + whole) / 2)
    assert trainer.validator.seconds_left(8, config, 100.0) == pytest.approx(whole / 2)


def test_a_terminal_has_a_bar_for_validation_which_goes_away_and_a_pipe_has_none(capsys, monkeypatch):
    terminal = Terminal(steps=10, done=0)
    terminal.validating(1, 4)
    terminal.close()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal = Terminal(steps=10, done=0)
    for done in range(5):
        terminal.validating(done, 4)
    assert terminal.validation_bar is None
    terminal.validating(2, 4)  # and left in the middle
    terminal.close()
    assert "validation" in capsys.readouterr().out


def test_the_bar_of_training_counts_down_the_time_that_training_tells(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal = Terminal(steps=10, done=0)
    record = {"step": 1, "loss": 2.0, "tokens_per_second": 1e3, "mfu": 0.1, "skipped_steps": 0, "seconds_left": 3725.5}
    terminal.record(record)
    terminal.advance(1)
    assert terminal.bar.postfix == "1:02:05 left, loss 2.0000, 1.0k tokens/s, mfu 10%"
    terminal.close()
    assert terminal.bar.postfix == "loss 2.0000, 1.0k tokens/s, mfu 10%"
