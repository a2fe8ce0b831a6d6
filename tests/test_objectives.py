"""What models learn from: masked tokens, sentences that follow or not, spans cut out, pairs; and runs of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.models.config import IMPORTED_ONLY, TOPOLOGIES, ModelConfig
from minitransformer.settings import declared
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets import Pairs, PlainText
from minitransformer.text.tokenizers import MASK, Bytes, Framing
from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.loader import Loader
from minitransformer.training.objectives import Masked, Objective, Seq2Seq, SpanCorruption
from minitransformer.training.objectives.masked import mask_tokens
from minitransformer.training.objectives.span_corruption import SENTINELS, random_spans
from tests.runs_for_tests import TEXT, TINY, configured, trainer_for

SHAPE = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 24}
FAST = {"steps": 12, "batch_size": 4, "eval_every": 5, "save_every": 3, "log_every": 1}


@pytest.fixture(scope="module", autouse=True)
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def config_of(folder: Path, objective: str, topology: str, **changes: Any) -> RunConfig:
    """A run of `objective` on a small text or, where it wants them, on pairs whose target is the source reversed."""
    (folder / "text.txt").write_text(TEXT)
    pairs = [f"{word}{i}" for i in range(120) for word in ("red", "blue")]
    (folder / "pairs.tsv").write_text("".join(f"{text}\t{text[::-1]}\n" for text in pairs))
    data = folder / ("pairs.tsv" if objective == "seq2seq" else "text.txt")
    dataset = Pairs.choose(batch_tokens=200) if objective == "seq2seq" else PlainText.choose()
    config = RunConfig(
        ModelConfig(topology=topology, **SHAPE),
        DataConfig(data=str(data), tokenizer="bytes", dataset=dataset),
        TrainingConfig(objective=objective, lr=1e-2, warmup_steps=2, schedule="constant", precision="fp32", **FAST),
    )
    return configured(config, **changes)


def prepared_for(config: RunConfig) -> tuple[RunConfig, Any]:
    """The prepared data, and `config` with its vocabulary."""
    prepared = config.prepare()
    return replace(config, model=replace(config.model, vocab_size=prepared.tokenizer.vocab_size)), prepared


def loader_for(config: RunConfig) -> Any:
    return Loader.of_run(*prepared_for(config))


# Masked tokens


def test_of_the_tokens_15_percent_are_masked_in_the_proportions_of_the_paper() -> None:
    tokens = torch.randint(1000, (400, 100))
    generator = torch.Generator().manual_seed(0)
    inputs, targets = mask_tokens(tokens, mask=5000, vocab_size=1000, probability=0.15, generator=generator, keep=1)
    chosen = targets != IGNORE
    assert not chosen[:, 0].any()
    assert chosen[:, 1:].float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    hidden, kept = inputs[chosen] == 5000, inputs[chosen] == tokens[chosen]
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_a_step_masks_the_same_tokens_whenever_it_is_asked_for_and_other_steps_mask_others(tmp_path: Path) -> None:
    loader = loader_for(config_of(tmp_path, "masked", "encoder"))
    first, again, other = (loader.training_batches(step)[0] for step in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets != IGNORE, other.targets != IGNORE)


def test_each_epoch_masks_other_tokens_of_the_same_text(tmp_path: Path) -> None:
    """Static masks would hide a window's same places in every epoch."""
    loader = loader_for(config_of(tmp_path, "masked", "encoder", batch_size=1))
    seen: dict[int, set[int]] = {}
    for step in range(1200):
        [batch] = loader.training_batches(step)
        restored = torch.where(batch.targets != IGNORE, batch.targets, batch.inputs)[0, 1:]
        place = hash(tuple(restored.tolist()))
        seen.setdefault(place, set()).add(hash(tuple((batch.targets[0] != IGNORE).tolist())))
    again = [masks for masks in seen.values() if len(masks) > 1]
    assert len(again) > 3


def test_validation_masks_the_same_tokens_every_time_and_no_padding(tmp_path: Path) -> None:
    loader = loader_for(config_of(tmp_path, "masked", "encoder"))
    first, again = list(loader.validation_batches()), list(loader.validation_batches())
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.targets, right.targets)
    tokens = sum(batch.inputs[:, 1:].numel() for batch in first)
    assert tokens >= len(loader.data.validation) - 1


def test_the_majority_baseline_is_the_most_frequent_token_of_training(tmp_path: Path) -> None:
    loader = loader_for(config_of(tmp_path, "masked", "encoder"))
    guess = Counter(loader.data.train.tolist()).most_common(1)[0][0]
    assert loader.majority_baseline == pytest.approx(float(np.mean(loader.data.validation == guess)))


def test_half_of_the_second_sentences_come_from_elsewhere_and_are_told_apart(tmp_path: Path) -> None:
    config = config_of(tmp_path, "masked", "encoder", next_sentence=True, num_segments=2, batch_size=64)
    loader = loader_for(config)
    [batch] = loader.training_batches(0)
    assert 0.2 < batch.follows.float().mean() < 0.8
    assert batch.segments.tolist()[0] == [0] * 12 + [1] * 12
    text = loader.data.train.tobytes()
    restored = torch.where(batch.targets != IGNORE, batch.targets, batch.inputs)[:, 1:]
    for row, follows in zip(restored.numpy().astype(loader.data.train.dtype), batch.follows, strict=True):
        assert row[:11].tobytes() in text
        assert row[11:].tobytes() in text
        if follows:
            assert row.tobytes() in text


# Spans


@given(length=st.integers(10, 300), density=st.floats(0.1, 0.5), mean=st.floats(1, 5), seed=st.integers(0, 99))
def test_spans_cut_out_the_asked_share_and_never_the_first_token(
    length: int, density: float, mean: float, seed: int
) -> None:
    cut = random_spans(length, density, mean, np.random.default_rng(seed))
    assert len(cut) == length
    assert cut.sum() == min(max(round(length * density), 1), length - 1)
    assert not cut[0]
    assert cut[-1]


def test_source_and_target_together_are_the_text(tmp_path: Path) -> None:
    loader = loader_for(config_of(tmp_path, "span-corruption", "encoder-decoder"))
    sentinels = set(loader.objective.sentinels.tolist())
    [batch] = loader.training_batches(2)
    text = loader.data.train.tolist()
    for source, target, inputs in zip(*(t.tolist() for t in (batch.source, batch.targets, batch.inputs)), strict=True):
        assert source[-1] == target[-1] == loader.data.tokenizer.end_of_text
        assert inputs == [loader.data.tokenizer.end_of_text, *target[:-1]]
        spans: dict[int, list[int]] = {}
        sentinel = target[0]
        for token in target[:-1]:
            if token in sentinels:
                sentinel, spans[token] = token, []
            else:
                spans[sentinel].append(token)
        restored = [t for token in source[:-1] for t in (spans[token] if token in sentinels else [token])]
        used = [token for token in source if token in sentinels]
        assert used == list(loader.objective.sentinels[: len(used)])
        assert any(text[i : i + len(restored)] == restored for i in range(len(text)))


def test_a_context_with_more_spans_than_sentinels_is_refused(tmp_path: Path) -> None:
    config, prepared = prepared_for(config_of(tmp_path, "span-corruption", "encoder-decoder"))
    long = replace(config, model=replace(config.model, context_length=2500))
    with pytest.raises(UserError, match=r"context_length 2500 gives 125 corrupted spans.* 100 sentinels: lower it"):
        Loader.of_run(long, prepared)


# The special tokens of an objective


def test_a_vocabulary_has_the_special_tokens_of_its_objective(tmp_path: Path) -> None:
    _, prepared = prepared_for(config_of(tmp_path, "masked", "encoder"))
    assert prepared.tokenizer.mask == prepared.tokenizer.special_tokens[MASK] == 257
    _, prepared = prepared_for(config_of(tmp_path, "span-corruption", "encoder-decoder"))
    assert set(SENTINELS) < set(prepared.tokenizer.special_tokens)
    assert prepared.tokenizer.vocab_size == 357


def test_an_objective_refuses_topologies_that_it_cannot_train() -> None:
    with pytest.raises(UserError, match="'causal' cannot train topology 'encoder': choose --objective masked"):
        replace(TINY, model=replace(TINY.model, topology="encoder"))


def test_padding_of_the_last_window_is_not_read(tmp_path: Path) -> None:
    config, prepared = prepared_for(config_of(tmp_path, "masked", "encoder", batch_size=1000))
    trainer = trainer_for(tmp_path / "run", prepared, config)
    [batch] = [batch for batch in trainer.learner.loader.validation_batches() if batch.is_token is not None]
    assert not batch.is_token[-1, -1]
    trainer.learner.model.eval()
    other = replace(batch, inputs=torch.where(batch.is_token, batch.inputs, 7))
    assert not torch.equal(other.inputs, batch.inputs)
    scores = [trainer.learner.objective.score(trainer.learner.model, each).nats.sum().item() for each in (batch, other)]
    assert scores[0] == scores[1]


def test_windows_are_framed_as_the_tokenizer_says_and_the_frame_is_never_masked(tmp_path: Path) -> None:
    config = config_of(tmp_path, "masked", "encoder", next_sentence=True, num_segments=2, batch_size=64)
    tokenizer = Bytes().with_special_tokens([MASK, "<|cls|>", "<|sep|>"])
    first, last = (tokenizer.special_tokens[name] for name in ("<|cls|>", "<|sep|>"))
    prepared = config.prepare([tokenizer.framed(Framing((first,), (last,)))])
    loader = Loader.of_run(config, prepared)
    [batch] = loader.training_batches(0)
    assert batch.inputs.shape == batch.segments.shape == (64, config.model.context_length)
    assert set(batch.inputs[:, 0].tolist()) == {first}
    assert set(batch.inputs[:, -1].tolist()) == {last}
    assert (batch.targets[:, [0, -1]] == IGNORE).all()
    [example] = loader.examples(1)
    assert (example[0], example[-1]) == (first, last)


@pytest.mark.parametrize("objective", ["seq2seq", "span-corruption"])
def test_sources_and_targets_are_framed_as_the_tokenizer_says(objective: str, tmp_path: Path) -> None:
    """As for BART: <s> … </s> on both sides, and another token before the target."""
    config = config_of(tmp_path, objective, "encoder-decoder")
    names = ["<|first|>", "<|last|>", "<|start|>", *SpanCorruption.special_tokens]
    tokenizer = Bytes().with_special_tokens(names)
    first, last, start = (tokenizer.special_tokens[name] for name in names[:3])
    framed = tokenizer.framed(Framing((first,), (last,), start=start))
    loader = Loader.of_run(config, config.prepare([framed]))
    for batch in (loader.training_batches(0)[0], next(iter(loader.validation_batches()))):
        for source, is_token, inputs, targets in zip(
            batch.source, batch.source_is_token, batch.inputs, batch.targets, strict=True
        ):
            source, targets = source[is_token].tolist(), targets[targets != IGNORE].tolist()
            assert (source[0], source[-1], targets[0], targets[-1]) == (first, last, first, last)
            assert inputs[: len(targets)].tolist() == [start, *targets[:-1]]


def test_documents_are_divided_as_the_tokenizer_says(tmp_path: Path) -> None:
    config = config_of(tmp_path, "causal", "decoder")
    framed = Bytes().with_special_tokens(["<|first|>"]).framed(Framing((257,)))
    prepared = config.prepare([framed])
    assert prepared.train[:2].tolist() == [256, 257]


@pytest.mark.parametrize("objective", ["masked", "seq2seq", "span-corruption"])
def test_the_loss_goes_through_the_call_of_the_model(objective: str, tmp_path: Path) -> None:
    """Otherwise what is compiled, or wrapped, would be passed by."""
    topology = {"masked": "encoder"}.get(objective, "encoder-decoder")
    both = {"next_sentence": True, "num_segments": 2} if objective == "masked" else {}
    config, prepared = prepared_for(config_of(tmp_path, objective, topology, **both))
    trainer = trainer_for(tmp_path / "run", prepared, config)
    calls: list[int] = []
    trainer.learner.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.learner.objective.loss_sum(trainer.learner.model, trainer.learner.loader.training_batches(0)[0])
    assert calls == [1]


# Whole runs

RUNS = [
    ("masked", "encoder", {}),
    ("masked", "encoder", {"next_sentence": True, "num_segments": 2}),
    ("span-corruption", "encoder-decoder", {"label_smoothing": 0.1}),
    ("seq2seq", "encoder-decoder", {"dropout": 0.2, "grad_accumulation": 2}),
    ("seq2seq", "encoder-decoder", {"separate_vocabularies": True, "tokenizer": "chars"}),
    ("seq2seq", "rnn", {}),
    ("causal", "decoder", {"num_experts": 3, "dropout": 0.1}),
]


@pytest.mark.parametrize(("objective", "topology", "changes"), RUNS, ids=str)
def test_every_objective_resumes_bit_for_bit(
    objective: str, topology: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(tmp_path, objective, topology, **changes)
    prepared = config.prepare()
    source, target = prepared.tokenizer, prepared.target_tokenizer
    own = None if target is source else target.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=source.vocab_size, target_vocab_size=own))
    whole = trainer_for(tmp_path / "whole", prepared, config)
    whole.train()
    trainer_for(tmp_path / "parts", prepared, configured(config, steps=7)).train()
    second = trainer_for(tmp_path / "parts", prepared, config, resume_at=7)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    for left, right in zip(whole.learner.model.parameters(), second.learner.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert whole.validation is not None
    assert second.validation is not None
    assert whole.validation.loss == second.validation.loss


def test_label_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    config, prepared = prepared_for(config_of(tmp_path, "seq2seq", "encoder-decoder", label_smoothing=0.3))
    trainer = trainer_for(tmp_path / "run", prepared, config)
    batch = trainer.learner.loader.training_batches(0)[0]
    trainer.learner.model.eval()
    with torch.no_grad():
        log_p = trainer.learner.model(batch.source, batch.inputs, source_is_token=batch.source_is_token).log_softmax(-1)
    real = batch.targets != IGNORE
    right = -log_p[real].gather(1, batch.targets[real][:, None]).sum()
    smooth = 0.7 * right - 0.3 * log_p[real].mean(-1).sum()
    torch.testing.assert_close(trainer.learner.objective.score(trainer.learner.model, batch).nats.sum(), right)
    torch.testing.assert_close(trainer.learner.objective.loss_sum(trainer.learner.model, batch), smooth)


def test_masked_and_seq2seq_are_found_by_their_names() -> None:
    assert Objective.named("masked") is Masked
    assert Objective.named("seq2seq") is Seq2Seq


def test_help_offers_the_topologies_that_an_objective_trains_and_no_other() -> None:
    trained = set().union(*(objective.topologies for objective in Objective.registry.values()))
    assert TOPOLOGIES.keys() - IMPORTED_ONLY == trained
    [topology] = [each for each in declared(ModelConfig) if each.name == "topology"]
    assert set(topology.about["help"].partition(": ")[2].split(", ")) == trained


def test_a_topology_that_nothing_trains_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="can only be imported, not trained"):
        RunConfig(ModelConfig(topology="encoder-headless")).check_trainable()
