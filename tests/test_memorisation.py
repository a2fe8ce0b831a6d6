"""`memorisation`: runs of tokens and secrets are found as often as they are there; exposure is its equation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.commands import memorisation, train
from minitransformer.evaluation.exposure import exposure
from minitransformer.evaluation.memorisation import Extraction
from minitransformer.generation.likelihoods import Continuation, log_likelihoods
from minitransformer.models.model import build_model
from minitransformer.runs.memorising import CanaryScorer, draw_texts, extract
from minitransformer.text import spans
from minitransformer.text.canaries import Canary, make_canaries, planted_rows
from minitransformer.text.datasets.text import is_validation
from minitransformer.text.spans import count_spans, covered_share, longest_runs
from minitransformer.text.tokenizers import Bytes
from tests.runs_for_tests import TINY, configured, refused, untrained_run

SIZES = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--tokenizer", "bytes"]
ids = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@pytest.fixture(scope="module", autouse=True)
def few_at_once() -> Iterator[None]:
    """Runs go across the borders of what is hashed at a time, and hashes share places in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "HASHED_AT_ONCE", 7)
        patch.setattr(spans, "TABLE_BITS", 3)
        yield


def places_of(span: list[int], text: list[int]) -> int:
    return sum(text[place : place + len(span)] == span for place in range(len(text) - len(span) + 1))


@given(text=ids, asked=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=5))
def test_a_span_is_counted_wherever_it_stands(text: list[int], asked: list[list[int]]) -> None:
    assert count_spans(asked, np.array(text, np.uint16)).tolist() == [places_of(span, text) for span in asked]


@given(text=ids, rows=st.integers(1, 3), shortest=st.integers(1, 4), data=st.data())
def test_the_longest_run_from_each_place_is_found(text: list[int], rows: int, shortest: int, data: Any) -> None:
    length = data.draw(st.integers(shortest, 9))
    asked = [data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)) for _ in range(rows)]

    def longest(row: list[int], at: int) -> int:
        lengths = range(shortest, length - at + 1)
        return max((n for n in lengths if places_of(row[at : at + n], text)), default=0)

    expected = [[longest(row, at) for at in range(length)] for row in asked]
    assert longest_runs(np.array(asked), np.array(text, np.uint16), shortest).tolist() == expected


@given(runs=st.lists(st.lists(st.integers(0, 6), min_size=6, max_size=6), min_size=1), least=st.integers(1, 6))
def test_a_token_is_covered_by_every_run_that_is_long_enough(runs: list[list[int]], least: int) -> None:
    runs = [[min(n, 6 - place) for place, n in enumerate(row)] for row in runs]
    expected = [
        sum(any(row[i] >= least and row[i] > at - i for i in range(at + 1)) for at in range(6)) / 6 for row in runs
    ]
    assert covered_share(np.array(runs), least).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("secret", ["07", "555-0199", "aB3", "k" * 30])
def test_other_secrets_have_the_form_of_the_planted_one_and_none_occurs_twice(secret: str) -> None:
    canary = Canary("call ", secret)
    others = canary.other_secrets(150, Random(0))
    assert len(set(others)) == len(others) == min(150, canary.num_secrets - 1)
    assert secret not in others

    def form(text: str) -> list[str]:
        return ["0" if c.isdigit() else "a" if c.islower() else "A" if c.isupper() else c for c in text]

    assert all(form(other) == form(secret) for other in others)


def test_secrets_are_planted_as_often_as_asked_and_none_is_held_out() -> None:
    canaries = make_canaries([0, 1, 5], each=4, digits=6, seed=3)
    planted = [json.loads(line)["text"] for line in planted_rows(canaries, seed=3).splitlines()]
    assert [planted.count(canary.text) for canary in canaries] == [0] * 4 + [1] * 4 + [5] * 4
    assert len({canary.before for canary in canaries}) == 12
    assert not any(is_validation(canary.text, 0.5) for canary in canaries)


@given(others=st.lists(st.integers(0, 9), min_size=1, max_size=60), nats=st.integers(0, 9))
def test_exposure_is_log_r_less_log_rank_and_a_tie_counts_half(others: list[int], nats: int) -> None:
    rank = 1 + sum(other < nats for other in others) + 0.5 * others.count(nats)
    found = exposure(nats, np.array(others, float), num_secrets=len(others) + 1)
    assert found.bits == pytest.approx(math.log2(len(others) + 1) - math.log2(rank))
    assert found.interval == (found.bits, found.bits)
    low, high = exposure(nats, np.array(others, float), num_secrets=10**6).interval
    assert low <= found.bits + 1e-9
    assert (high is None) == (rank == 1)


def test_the_fitted_exposure_is_that_of_the_distribution_and_goes_on_beyond_the_sample() -> None:
    drawn = np.random.default_rng(0).normal(50, 4, 100_000)
    for nats in (52.0, 46.0, 42.0, 30.0):
        expected = -math.log2(math.erfc((50 - nats) / 4 / math.sqrt(2)) / 2)
        assert exposure(nats, drawn, 10**9).fitted == pytest.approx(expected, rel=0.03)
    halves = np.random.default_rng(0).normal(size=(2, 100_000))
    skewed = 50 + 4 * (0.8 * abs(halves[0]) + 0.6 * halves[1])
    by_rank = exposure(46.0, skewed, 10**9)
    assert by_rank.fitted == pytest.approx(by_rank.bits, rel=0.03)
    assert math.isfinite(exposure(-1e4, drawn, 10**9).fitted or math.inf)
    assert exposure(1.0, np.ones(9), 10**9).fitted is None


def test_texts_are_grouped_by_how_often_they_stand_in_training() -> None:
    found = dict(Extraction(np.array([5, 1, 5, 0]), 5).by_repetitions(np.array([1, 1, 9, 10])))
    assert {name: (len(each.verbatim), each.complete) for name, each in found.items()} == {
        "once": (2, 1),
        "2 to 9 times": (1, 1),
        "10 times or more": (1, 0),
    }


@pytest.mark.unchecked_shapes
def test_a_text_is_extracted_as_far_as_greedy_decoding_repeats_it(shake: Any) -> None:
    model: Any = shake(build_model(configured(TINY, vocab_size=5).model)).eval()
    texts = draw_texts(np.random.default_rng(0).integers(0, 5, 400), 10, count=60, seed=0)
    written = torch.from_numpy(texts[:, :4])
    with torch.no_grad():
        for _ in range(6):
            written = torch.cat([written, model(written)[:, -1:].argmax(-1)], dim=1)
    same = (written == torch.from_numpy(texts))[:, 4:].tolist()
    expected = [[*row, False].index(False) for row in same]
    assert len(set(expected)) > 2
    assert extract(model, texts, prefix=4).verbatim.tolist() == expected


@pytest.mark.unchecked_shapes
def test_the_exposure_of_a_canary_is_its_rank_among_the_likelihoods_of_all_others(shake: Any) -> None:
    tokenizer = Bytes()
    model: Any = shake(build_model(configured(TINY, vocab_size=tokenizer.vocab_size).model)).eval()
    scorer = CanaryScorer(model, tokenizer, others=1000, seed=0)
    training = np.array([256, *tokenizer.encode("pin 42.")] * 3)
    for secret, count in (("42", 3), ("17", 0)):
        [found] = scorer.results([Canary("pin ", secret, ".")], training)
        texts = [Continuation((256,), tuple(tokenizer.encode(f"pin {number:02}."))) for number in range(100)]
        nats = [-each.nats for each in log_likelihoods(model, texts)]
        assert found.in_training == count
        assert found.exposure.is_exact
        assert found.exposure.rank == 1 + sum(other < nats[int(secret)] for other in nats)


@pytest.fixture
def planted(here: Path) -> None:
    """A run, `run`, that has learned planted secrets beside a text."""
    assert memorisation.main(["plant", "--out", "planted", "--times", "0", "2", "--each", "2", "--digits", "4"]) == 0
    data = ["--data", "planted/planted.jsonl", "my.txt", "--device", "cpu", "--precision", "fp32", "--steps", "2"]
    assert train.main(["gpt-nano", *data, *SIZES, "--context-length", "64", "--out", "run"]) == 0


@pytest.mark.unchecked_shapes
@pytest.mark.usefixtures("planted")
def test_a_run_is_measured_and_planted_secrets_stand_in_its_training_text(capsys: Any) -> None:
    flags = ["--texts", "20", "--samples", "3", "--others", "30", "--canaries", "planted/canaries.jsonl"]
    assert memorisation.main(["measure", "run", *flags, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert found["extraction"]["training"]["texts"] == found["extraction"]["validation"]["texts"] == 20
    assert (found["extraction"]["prefix"], found["extraction"]["length"]) == (32, 32)
    assert found["overlap"]["validation"]["longest"] >= 8
    assert [each["in_training"] for each in found["canaries"]] == [0, 0, 2, 2]
    assert "in training  secrets  written" in out
    assert "warning" not in out
    # Of another text, none of the secrets that were planted is there.
    assert memorisation.main(["measure", "run", *flags, "--data", "my.txt"]) == 0
    assert "2 of 4 secrets do not stand in the training text as often as planted" in capsys.readouterr().out
    with Path("my.txt").open("a") as file:
        file.write("changed")
    assert "is not the text that run started with" in refused(capsys, "measure", "run", main=memorisation.main)


@pytest.mark.unchecked_shapes
@pytest.mark.usefixtures("planted")
def test_what_a_model_cannot_be_asked_is_one_sentence(capsys: Any) -> None:
    Path("bad.jsonl").write_text('{"before": "a", "secret": "-"}\n')
    Path("long.jsonl").write_text(json.dumps({"before": "a" * 70, "secret": "1"}) + "\n")
    for flags, words in (
        (["--prefix-length", "60", "--length", "9"], "and 9 more are 69, and the model reads 64: choose a smaller"),
        (["--canaries", "no.jsonl"], "there is no file no.jsonl"),
        (["--canaries", "bad.jsonl"], "bad.jsonl line 1 has the secret '-', without digits"),
        (["--texts", "1", "--samples", "1", "--canaries", "long.jsonl"], "the model reads 64: plant a shorter one"),
    ):
        assert words in refused(capsys, "measure", "run", *flags, main=memorisation.main)


@pytest.mark.unchecked_shapes
def test_a_run_without_its_text_and_one_that_predicts_no_next_token_are_refused(
    here: Path, shake: Any, capsys: Any
) -> None:
    untrained_run(here / "imported", shake, "causal")
    untrained_run(here / "encoder", shake, "masked", topology="encoder")
    for name, words in (
        ("imported", "imported was imported, without the text that it has learned: name that with --data"),
        ("encoder", "the objective of encoder is masked: name another run"),
    ):
        assert words in refused(capsys, "measure", name, main=memorisation.main)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["measure", "run", "--texts", "0"], "texts is 0: it must be at least 1"),
        (["measure", "run", "--temperature", "nan"], "temperature is nan: it must be at least 0"),
        (["measure", "run", "--json", "my.txt"], "my.txt already exists: choose another --json"),
        (["plant", "--out", "my.txt"], "my.txt already exists: choose another --out"),
        (["plant", "--out", "new", "--times", "3", "-1"], "give whole numbers of at least 0"),
        (["plant", "--out", "new", "--each", "999"], "4,995 canaries are asked for, and there are 484"),
        (["plant", "--out", "new", "--digits", "1"], "digits is 1: it must be 2 to 18"),
        (["erase"], "unknown task of memorisation 'erase'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_mistake_is_one_sentence(flags: list[str], words: str, capsys: Any) -> None:
    assert words in refused(capsys, *flags, main=memorisation.main)
