"""Multiple choice and minimal pairs: prompts with examples, normalisations, ties, and `evaluate --choices`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.commands import evaluate
from minitransformer.errors import UserError
from minitransformer.evaluation.choices import (
    Normalisation,
    ScoredCandidate,
    ScoredItem,
    accuracies,
    accuracy,
    by_group,
    chance,
    likeliest,
)
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.text.choices import ChoiceItem, ChoiceRow, FewShot, read_choices, read_minimal_pairs
from minitransformer.text.tokenizers import BPE, Tokenizer
from minitransformer.text.tokenizers.basic import Bytes
from tests.runs_for_tests import TEXT, refused, untrained_run

SUM, TOKEN, BYTE, LESS = (Normalisation.named(name) for name in ("sum", "token", "byte", "unconditional"))


def row(question: str, *choices: str, answer: Any = 0) -> dict[str, Any]:
    return {"question": question, "choices": list(choices), "answer": answer}


def pair(good: str, bad: str, **about: str) -> dict[str, Any]:
    return {"sentence_good": good, "sentence_bad": bad, **about}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


ROWS = [row(f"q{number}", f"a{number}", "b") for number in range(9)]


def read_rows_of(rows: list[dict[str, Any]]) -> list[ChoiceRow]:
    return [ChoiceRow(each["question"], each, tuple(each["choices"]), each["answer"]) for each in rows]


def contexts(pool: list[ChoiceRow], rows: list[ChoiceRow], seed: int, shots: int) -> dict[str, str]:
    prompts = FewShot(pool, shots, seed, "{{ question }}?", "of the test")
    return {each.where: prompts.item(each).context for each in rows}


def examples_in(context: str) -> list[str]:
    return [each.split("?")[0] for each in context.split("\n\n")[:-1]]


@given(st.permutations(ROWS), st.integers(0, 99), st.integers(0, 8))
def test_examples_follow_from_content_and_seed_and_not_from_the_order_of_rows(
    order: list[dict[str, Any]], seed: int, shots: int
) -> None:
    rows, shuffled = read_rows_of(ROWS), read_rows_of(order)
    assert contexts(rows, rows, seed, shots) == contexts(shuffled, shuffled, seed, shots)


@given(st.integers(0, 999), st.integers(0, 8))
def test_an_item_has_as_many_different_examples_as_asked_and_is_none_of_them(seed: int, shots: int) -> None:
    rows = read_rows_of(ROWS)
    for name, context in contexts(rows, rows, seed, shots).items():
        found = examples_in(context)
        assert len(set(found)) == len(found) == shots
        assert name not in found


def test_every_other_row_may_be_an_example_and_seeds_draw_others() -> None:
    rows = read_rows_of(ROWS)
    drawn = [examples_in(contexts(rows, rows[:1], seed, 1)["q0"])[0] for seed in range(200)]
    assert set(drawn) == {f"q{number}" for number in range(1, 9)}
    assert max(map(drawn.count, drawn)) < 50


def test_a_copy_of_an_item_is_no_example_of_it() -> None:
    rows = read_rows_of([row("q", "a", "b"), row("q", "a", "b"), row("p", "a", "b")])
    rows[1] = replace(rows[1], where="a later line")
    assert set(contexts(rows, rows, 0, 1).values()) == {"p? a\n\nq?", "q? a\n\np?"}
    with pytest.raises(UserError, match="q is to have 2 examples, and there are 1 other rows: ask for fewer"):
        contexts(rows, rows, 0, 2)


def test_examples_stand_before_an_item_with_their_answers(tmp_path: Path) -> None:
    rows = read_choices(
        jsonl(tmp_path / "items.jsonl", row("Who?", "he", "she", answer="she"), row("Why?", "so", "no"))
    )
    item = FewShot(rows, shots=1).item(rows[1])
    assert item.context == "Question: Who?\nAnswer: she\n\nQuestion: Why?\nAnswer:"
    assert (item.candidates, item.answer, item.continuation("so")) == (("so", "no"), 0, " so")


@pytest.mark.parametrize(
    ("context", "candidate", "expected"), [("a", "b", " b"), ("a ", "b", "b"), ("a", "\nb", "\nb"), ("", "b", "b")]
)
def test_a_space_stands_before_a_candidate_unless_there_is_one(context: str, candidate: str, expected: str) -> None:
    assert ChoiceItem("here", context, (candidate,), 0).continuation(candidate) == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (row("q", "a", "b", answer="c"), "has the answer 'c', which is not among its choices ['a', 'b']: give one of"),
        (row("q", "a", "b", answer=2), "has the answer 2, which is not among"),
        (row("q", "a", "b", answer=-1), "has the answer -1, which is not among"),
        (row("q", "a", "b", answer=True), "has the answer True, which is not among"),
        (row("q", "a"), "has the choices ['a']: give two or more that differ"),
        (row("q", "a", "a"), "has the choices ['a', 'a']: give two or more that differ"),
        (row("q", "a", " "), "has the choices ['a', ' ']: give a list of texts that are not blank"),
        ({"choices": "ab", "answer": 0}, "has the choices 'ab': give a list of texts that are not blank"),
        ({"question": "q", "answer": 0}, "has no field 'choices', only 'question', 'answer': add it"),
        ({"question": "q", "choices": ["a", "b"]}, "has no field 'answer', only 'question', 'choices': add it"),
        ([1], "is [1]: give a JSON object for each item"),
    ],
)
def test_a_row_that_is_no_item_is_one_sentence_with_its_line(content: Any, sentence: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "items.jsonl", row("q", "a", "b"), content)
    with pytest.raises(UserError) as raised:
        read_choices(path)
    assert f"{path} line 2 {sentence}" in str(raised.value)


def test_minimal_pairs_are_read_as_blimp_has_them(tmp_path: Path) -> None:
    about = {"field": "syntax", "linguistics_term": "island_effects", "pairID": "0", "simple_LM_method": True}
    lines = [pair("He is.", "He are.", UID="agreement", **about), pair("It is.", "It are.")]
    assert read_minimal_pairs(jsonl(tmp_path / "own.jsonl", *lines)) == [
        ChoiceItem(f"{tmp_path}/own.jsonl line 1", "", ("He is.", "He are."), 0, "agreement"),
        ChoiceItem(f"{tmp_path}/own.jsonl line 2", "", ("It is.", "It are."), 0, "own"),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"sentence_good": "a"}, "line 1 has no field 'sentence_bad': its strings are 'sentence_good'"),
        (pair("a", "a"), "line 1 has the sentences 'a' and 'a': give two that differ"),
        (pair("a", " "), "line 1 has the sentences 'a' and ' ': give two that differ"),
    ],
)
def test_a_row_that_is_no_pair_is_one_sentence(content: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_minimal_pairs(jsonl(tmp_path / "pairs.jsonl", content))
    assert sentence in str(raised.value)


def test_each_normalisation_may_choose_another_candidate() -> None:
    item = ScoredItem(
        (
            ScoredCandidate(-4.0, 1, 4, -9.0),  # the likeliest
            ScoredCandidate(-6.0, 4, 5, -8.0),  # by token
            ScoredCandidate(-7.0, 3, 9, -9.5),  # by byte
            ScoredCandidate(-9.0, 2, 3, -30.0),  # less unconditional
        ),
        answer=1,
    )
    assert [likeliest(item, each) for each in (SUM, TOKEN, BYTE, LESS)] == [[0], [1], [2], [3]]
    assert LESS.score(item.candidates[3]) == 21.0
    assert {name: each.value for name, each in accuracies([item]).items()} == {
        **dict.fromkeys(("sum", "byte", "unconditional"), 0.0),
        "token": 1.0,
    }


def scored(*nats: float, answer: int = 0, group: str = "") -> ScoredItem:
    return ScoredItem(tuple(ScoredCandidate(each, 1, 1) for each in nats), answer, group)


def test_ties_count_their_expected_value_and_are_counted() -> None:
    tie, right, wrong = scored(-1.0, -1.0), scored(-1.0, -2.0), scored(-2.0, -1.0)
    found = accuracy([tie, right, wrong], SUM)
    assert (found.items, found.right, found.ties, found.value) == (3, 1.5, 1, 0.5)
    assert accuracy([scored(-1.0, -1.0, -1.0, -1.0)], SUM).value == 0.25
    assert accuracy([scored(-1.0, -1.0, -2.0, answer=1)], SUM).value == 0.5
    assert accuracy([scored(-1.0, -1.0, -2.0, answer=2)], SUM).value == 0.0
    assert accuracy([scored(-2.0, -1.0, -2.0)], SUM).ties == 0


@given(st.lists(st.integers(2, 6), min_size=1, max_size=20))
def test_a_model_that_tells_nothing_apart_has_the_accuracy_of_chance(sizes: list[int]) -> None:
    items = [scored(*[-1.0] * size, answer=size - 1) for size in sizes]
    found = accuracy(items, SUM)
    assert math.isclose(found.value, chance(items))
    assert found.interval[0] <= found.value <= found.interval[1]


def test_without_a_context_nothing_is_left_out_and_groups_are_apart() -> None:
    items = [scored(-1.0, -2.0, group="b"), scored(-2.0, -1.0, group="a"), scored(-1.0, -2.0, group="b")]
    assert accuracies(items).keys() == {"sum", "token", "byte"}
    assert {name: accuracy(some, SUM).value for name, some in by_group(items).items()} == {"a": 0.0, "b": 1.0}


@pytest.fixture
def folder(tmp_path: Path, shake: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that reads 120 bytes."""
    monkeypatch.chdir(tmp_path)
    untrained_run(tmp_path / "run", shake, "causal", context_length=120)
    return tmp_path


def scorer(folder: Path, tokenizer: Tokenizer | None = None) -> ChoiceScorer:
    from minitransformer.runs import Run

    run = Run.open(folder / "run")
    return ChoiceScorer(run.load_model(), tokenizer or run.tokenizer)


def test_candidates_are_scored_after_their_context_and_without_it(folder: Path) -> None:
    ours = scorer(folder)
    [item] = ours.scored([ChoiceItem("here", "Who?", ("me", "we all"), 0)])

    def nats(ids: list[int], last: int) -> float:
        with torch.no_grad():
            each = ours.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return float(each[torch.arange(len(ids) - 1), ids[1:]][-last:].sum())

    for text, found in zip(("me", "we all"), item.candidates, strict=True):
        assert (found.num_tokens, found.num_bytes) == (len(text) + 1, len(text))
        assert found.nats == pytest.approx(nats(list(f"Who? {text}".encode()), len(text) + 1), abs=1e-3)
        alone = [ours.tokenizer.end_of_text, *f" {text}".encode()]
        assert found.unconditional_nats == pytest.approx(nats(alone, len(text) + 1), abs=1e-3)


def test_the_score_of_an_item_does_not_depend_on_the_other_items(folder: Path) -> None:
    ours = scorer(folder)
    items = [ChoiceItem(str(n), "abc" * (n % 4), ("x" * (n + 1), "y" * (5 - n % 5)), 0) for n in range(20)]
    together = list(ours.scored(items))
    assert [next(iter(ours.scored([item]))) for item in items] == together
    assert list(ours.scored(items[::-1])) == together[::-1]


def test_a_text_is_encoded_whole_and_what_crosses_the_boundary_is_scored(folder: Path) -> None:
    tokenizer = BPE.fit(BPE.Settings(), lambda: iter([TEXT]), 300)
    ours = scorer(folder, tokenizer)
    for context, candidate in (("The King", "spoke"), ("The Ki", "ng"), ("The ", "King"), ("", "The King")):
        item = ChoiceItem("here", context, (candidate,), 0)
        text = ours.tokens(item, candidate)
        start = [tokenizer.end_of_text] if not context else []
        assert [*text.context, *text.ids] == [*start, *tokenizer.encode(context + item.continuation(candidate))]
        assert tokenizer.decode(text.ids).endswith(candidate)
        assert context.startswith(tokenizer.decode(text.context))


def test_a_model_that_does_not_continue_texts_is_refused(tmp_path: Path, shake: Callable[[Any], Any]) -> None:
    model = untrained_run(tmp_path / "encoder", shake, "masked", topology="encoder")
    with pytest.raises(UserError, match="topology 'encoder' gives no likelihood of a text that follows another"):
        ChoiceScorer(model, Bytes())


def test_evaluate_chooses_and_tells_how_often_it_is_right(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"Is it {n}?", "yes", "no", "no one knows", answer=n % 3) for n in range(6)]
    jsonl(folder / "items.jsonl", *rows)
    (folder / "prompt.txt").write_text("{{ question }}")
    flags = ["run", "--choices", "--data", "items.jsonl", "--template", "prompt.txt", "--shots", "1", "--seed", "2"]
    assert evaluate.main([*flags, "--out", "items-scored.jsonl", "--json", "found.json"]) == 0
    said = capsys.readouterr().out
    assert "6 items, after 1 examples each; chance is 33.3%" in said
    lines = [json.loads(line) for line in (folder / "items-scored.jsonl").read_text().splitlines()]
    found = json.loads((folder / "found.json").read_text())
    assert (found["data"], found["shots"], found["seed"]) == ("items.jsonl", 1, 2)
    found = found["choices"]
    assert (found["items"], found["groups"]) == (6, {})
    for name in Normalisation.registry:
        right = sum(line["chosen"][name] == [line["answer"]] for line in lines)
        assert found["accuracy"][name]["accuracy"] == right / 6
        assert f"{right / 6:.1%}" in next(line for line in said.splitlines() if Normalisation.named(name).label in line)
    assert [line["answer"] for line in lines] == [n % 3 for n in range(6)]
    assert all(line["context"].endswith(f"Is it {n}?") for n, line in enumerate(lines))
    jsonl(folder / "reversed.jsonl", *rows[::-1])
    assert evaluate.main([*flags[:3], "reversed.jsonl", *flags[4:], "--out", "again.jsonl"]) == 0
    again = [json.loads(line) for line in (folder / "again.jsonl").read_text().splitlines()]
    assert [line["candidates"] for line in again[::-1]] == [line["candidates"] for line in lines]


def test_evaluate_tells_minimal_pairs_apart_by_what_they_test(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(folder / "one.jsonl", pair("He is.", "He are.", UID="be"), pair("I am.", "I are.", UID="be"))
    jsonl(folder / "two.jsonl", pair("He has.", "He have."))
    assert evaluate.main(["run", "--choices", "--data", "one.jsonl", "two.jsonl", "--json", "found.json"]) == 0
    found = json.loads((folder / "found.json").read_text())["choices"]
    assert {name: of["sum"]["items"] for name, of in found["groups"].items()} == {"be": 2, "two": 1}
    assert found["accuracy"].keys() == {"sum", "token", "byte"}
    assert "be (small)       2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shots", "2"], "--shots belongs to --choices: give that too, or leave it out"),
        (["--choices", "--data", "items.jsonl", "--target-data", "b.txt"], "--target-data has no effect on --choices"),
        (["--choices"], "--choices needs items: name their .jsonl files with --data"),
        (["--choices", "--data", "none.jsonl"], "none.jsonl does not exist: give a .jsonl file"),
        (["--choices", "--data", "text.txt"], "text.txt is no .jsonl: give a .jsonl file"),
        (["--choices", "--data", "empty.jsonl"], "empty.jsonl is empty: give a JSON object for each item"),
        (["--choices", "--data", "items.jsonl", "pairs.jsonl"], "evaluate them one after the other"),
        (["--choices", "--data", "pairs.jsonl", "--shots", "1"], "minimal pairs, which no prompt precedes: leave out"),
        (["--choices", "--data", "items.jsonl", "--shots", "-1"], "shots is -1: it must be at least 0"),
        (["--choices", "--data", "items.jsonl", "--shots", "2"], "to have 2 examples, and there are 1 other rows"),
        (["--choices", "--data", "items.jsonl", "--seed", "2"], "--seed and --examples have no effect without --shots"),
        (["--choices", "--data", "items.jsonl", "--batch-size", "2"], "--batch-size has no effect on --choices"),
        (["--choices", "--data", "items.jsonl", "--out", "items.jsonl"], "items.jsonl already exists: choose another"),
        (["--choices", "--data", "other.jsonl"], "needs what other.jsonl line 1 lacks ('question' is undefined)"),
        (
            ["--choices", "--data", "long.jsonl"],
            "long.jsonl line 1 has 221 tokens with its examples and",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    flags: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(folder / "items.jsonl", row("q", "a", "b"), row("p", "a", "b"))
    jsonl(folder / "pairs.jsonl", pair("a", "b"))
    jsonl(folder / "other.jsonl", {"choices": ["a", "b"], "answer": 0})
    jsonl(folder / "long.jsonl", row("q" * 200, "aa", "b"))
    jsonl(folder / "empty.jsonl")
    (folder / "text.txt").write_text("a text")
    assert sentence in refused(capsys, "run", *flags, main=evaluate.main)
