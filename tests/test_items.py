"""Estimates over items: intervals, groups and their gaps, paired differences, and texts with a word exchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.commands import evaluate, train
from minitransformer.errors import UserError
from minitransformer.evaluation.counterfactuals import (
    Change,
    Exchange,
    Variant,
    change_of_class,
    change_of_text,
    read_exchanges,
    sensitivity,
)
from minitransformer.evaluation.estimates import SMALL, estimates_of, largest_gaps, paired_differences
from minitransformer.evaluation.items import Items
from minitransformer.runs import Run
from minitransformer.runs.comparing import exchanged_data
from minitransformer.runs.evaluating import HeldOutData
from tests.runs_for_tests import refused, untrained_run

TINY = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "24", "--tokenizer", "bytes"]


def windows(nats: Any) -> Items:
    """Windows of 10 targets and 5 bytes with these sums of nats."""
    values = np.asarray(nats, np.float64)
    counts = np.ones(len(values), np.int64)
    return Items({"nats": values, "targets": 10 * counts, "tokens": 10 * counts, "bytes": 5.0 * counts})


def normal(mean: float, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 2.0, count)


# --- intervals


def test_the_bootstrap_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    nats = normal(30, 400)
    found = estimates_of(windows(nats))
    loss = found["validation_loss"]
    assert loss.interval is not None
    error = nats.std() / 20 / 10
    assert loss.value == pytest.approx(nats.mean() / 10)
    assert loss.interval == pytest.approx((loss.value - 1.96 * error, loss.value + 1.96 * error), abs=0.2 * error)
    for name, of_loss in (("perplexity", math.exp), ("bits_per_byte", lambda each: each * 10 / 5 / math.log(2))):
        assert found[name].value == pytest.approx(of_loss(loss.value))
        assert found[name].interval == pytest.approx(tuple(map(of_loss, loss.interval)))


def test_one_item_has_no_bootstrap_interval() -> None:
    assert estimates_of(windows([3.0]))["validation_loss"].interval is None


@settings(max_examples=6)
@given(st.lists(st.floats(0, 50), min_size=2, max_size=20))
def test_a_model_does_not_differ_from_itself_and_a_constant_is_a_clear_difference(nats: list[float]) -> None:
    same = paired_differences(windows(nats), windows(nats))["validation_loss"]
    assert (same.difference.value, same.difference.interval, same.is_clear) == (0, (0, 0), False)
    other = paired_differences(windows(np.array(nats) + 1), windows(nats))["validation_loss"]
    assert other.difference.value == pytest.approx(0.1)
    assert other.difference.interval == pytest.approx((0.1, 0.1))
    assert other.is_clear


# --- groups


def test_the_largest_gap_is_between_the_extremes_and_small_groups_are_in_none() -> None:
    groups = {"a": normal(30, 60), "b": normal(36, 50, 1), "c": normal(32, 40, 2), "small": normal(90, SMALL - 1)}
    gap = largest_gaps({name: windows(nats) for name, nats in groups.items()})["validation_loss"]
    assert (gap.lowest, gap.highest) == ("a", "b")
    assert gap.gap.value == pytest.approx((groups["b"].mean() - groups["a"].mean()) / 10)
    assert gap.gap.interval is not None
    low, high = gap.gap.interval
    alone = 1.96 * math.sqrt(4 / 60 + 4 / 50) / 10
    assert (high - low) / 2 > alone  # all pairs at once
    assert (high + low) / 2 == pytest.approx(gap.gap.value)
    assert low > 0
    assert largest_gaps({"a": windows(normal(30, 40)), "small": windows(normal(90, 9))}) == {}


def test_a_gap_of_equal_groups_names_two_of_them() -> None:
    gap = largest_gaps({name: windows(normal(30, 40)) for name in "abc"})["validation_loss"]
    assert (gap.lowest, gap.highest, gap.gap.value) == ("a", "c", 0)


def test_gaps_of_groups_without_a_difference_rarely_exclude_none() -> None:
    clear = 0
    for seed in range(10):
        groups = {str(each): windows(normal(30, 40, 10 * seed + each)) for each in range(3)}
        interval = largest_gaps(groups)["validation_loss"].gap.interval
        assert interval is not None
        clear += interval[0] > 0
    assert clear <= 2


# --- exchanges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He said he would.", "She said she would."),
        ("The others; hence he.", "The others; hence she."),
        ("HE", "HE"),
    ],
)
def test_a_word_is_exchanged_where_it_stands_alone_with_its_capital(text: str, expected: str) -> None:
    assert Exchange("pronouns", "he", "she").applied(text) == expected


def test_names_are_exchanged_with_capitals_unless_the_text_has_none() -> None:
    exchange = Exchange("names", "Anna", "Mei")
    assert exchange.applied("Anna met anna.") == "Mei met anna."
    assert exchange.applied("anna's film") == "mei's film"


def test_the_exchanges_of_the_package_are_words_of_four_kinds_that_begin_alike() -> None:
    found = read_exchanges()
    assert {each.kind for each in found} == {"names", "gender", "pronouns", "nationalities"}
    assert len(set(found)) == len(found) >= 120
    for each in found:
        assert each.word.isalpha()
        assert each.word[0].isupper() == each.other[0].isupper()
        if each.kind == "nationalities":  # "a" and "an" before them
            assert (each.word[0] in "AEIO") == (each.other[0] in "AEIO"), each


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("he\tshe\n", "its first line must be kind, tab, word, tab, other"),
        ("kind\tword\tother\n", "has no exchanges"),
        ("kind\tword\tother\na\tb\tb\n", "line 2 is 'a\\\\tb\\\\tb': give a kind, a word and another word"),
    ],
)
def test_a_list_of_exchanges_that_is_none_is_one_sentence(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_exchanges(tmp_path / "list.tsv")


def test_changes_are_those_of_their_definitions() -> None:
    change = change_of_class(np.array([0.6, 0.4]), np.array([0.3, 0.7]))
    assert (change.is_other, change.amount) == (True, pytest.approx(0.3))
    exchange = Exchange("names", "Anna", "Mei")
    assert change_of_text("Anna is tall.", "Mei is tall.", exchange) == Change(False, 0.0)
    assert change_of_text("Anna is tall.", "Mei is short.", exchange) == Change(True, pytest.approx(1 / 4))
    found = sensitivity(
        "all",
        [(Variant(0, exchange), change), (Variant(0, exchange), Change(False, 0.1, np.array([0.1, -0.1])))],
        ["a", "b"],
    )
    assert (found.texts, found.variants, found.changed.value, found.is_small) == (1, 2, 0.5, True)
    assert found.amount.value == pytest.approx(0.2)
    assert found.shift["b"].value == pytest.approx(0.1)
    assert found.changed.interval is None


# --- the command

REVIEWS = [
    {"text": f"{who} was {what} {n}", "label": label, "place": place}
    for n in range(16)
    for who, place in (("He", "north"), ("Anna", "south"))
    for what, label in (("good", "yes"), ("bad", "no"))
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classifiers, one of which reads less of a text, and their data."""
    path = tmp_path_factory.mktemp("items")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("MINITRANSFORMER_DATA", str(path / "work"))
        jsonl(path / "rows.jsonl", [{"text": " ", "label": "no", "place": "blank"}, *REVIEWS])
        common = ["bert-mini", "--objective", "classify", "--data", "rows.jsonl", *TINY, "--device", "cpu"]
        for name, steps in (("run", "8"), ("other", "2")):
            assert train.main([*common, "--precision", "fp32", "--steps", steps, "--lr", "3e-2", "--out", name]) == 0
    return path


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(folder / "work"))
    return folder


def evaluated(*flags: str) -> dict[str, Any]:
    out = Path("found.json")
    out.unlink(missing_ok=True)
    assert evaluate.main([*flags, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.unchecked_shapes
def test_the_metrics_of_a_group_are_those_of_its_rows_alone(inside: Path, capsys: Any) -> None:
    rows = [*REVIEWS, {"text": "He was alone", "label": "no", "place": "east"}]
    found = evaluated("run", "--data", jsonl(inside / "all.jsonl", rows), "--group-by", "place")["metrics_by_group"]
    said = capsys.readouterr().out
    assert found["values"].keys() == {"north", "south", "east"}
    (inside / "all.csv").write_text(
        "text,label,place\n" + "".join(f"{row['text']},{row['label']},{row['place']}\n" for row in rows)
    )
    assert evaluated("run", "--data", "all.csv", "--group-by", "place")["metrics_by_group"] == found
    for place, group in found["values"].items():
        own = jsonl(inside / f"{place}.jsonl", [row for row in rows if row["place"] == place])
        alone = evaluated("run", "--data", own)["metrics"]
        assert group["small"] == (place == "east")
        for name in ("items", "validation_loss", "accuracy", "macro_f1", "calibration_error"):
            values = [each if name == "items" else each["value"] for each in (group[name], alone[name])]
            assert values[0] == pytest.approx(values[1], rel=1e-5), name
    north, south = (found["values"][place]["accuracy"]["value"] for place in ("north", "south"))
    assert found["gaps"]["accuracy"]["value"] == pytest.approx(abs(north - south))
    assert found["values"]["east"]["validation_loss"]["interval"] is None
    assert "east (small)" in said
    assert "east is small (fewer than 30 items): too few to be compared, and in no gap" in said


@pytest.mark.unchecked_shapes
def test_the_column_of_a_validation_split_is_that_of_its_rows(inside: Path) -> None:
    data = HeldOutData.of_run(Run.open(inside / "run"))
    texts = [data.text_of(number)["text"] for number in range(len(data.column("place")))]
    places = {row["text"]: row["place"] for row in REVIEWS}
    assert texts
    assert data.column("place") == [places[text] for text in texts]


@pytest.mark.unchecked_shapes
def test_two_runs_are_compared_item_by_item_on_one_page(inside: Path) -> None:
    jsonl(inside / "test.jsonl", REVIEWS)
    flags = ["run", "--data", "test.jsonl", "--against", "other", "--counterfactuals", "--html", "page.html"]
    found = evaluated(*flags)
    ours, theirs = (evaluated(name, "--data", "test.jsonl")["metrics"] for name in ("run", "other"))
    for name, each in found["metrics_against"].items():
        if name != "items":
            assert (each["first"], each["second"]) == (ours[name]["value"], theirs[name]["value"])
            low, high = each["difference"]["interval"]
            assert low <= each["difference"]["value"] <= high
    kinds = found["counterfactuals"]["kinds"]
    assert {name: kinds[name]["variants"] for name in kinds} == {"all": 64, "names": 32, "pronouns": 32}
    page = Path("page.html").read_text()
    for words in ("Confusion matrix", "Reliability", "Beside other, on the same 64 items", "The 20 worst items"):
        assert words in page
    assert page.count("<img") == 2


@pytest.mark.unchecked_shapes
def test_a_counterfactual_answer_is_that_to_the_exchanged_text(inside: Path) -> None:
    (inside / "list.tsv").write_text("kind\tword\tother\nours\tHe\tAnna\n")
    north = [row for row in REVIEWS if row["place"] == "north"]
    exchanged = [{**row, "text": row["text"].replace("He", "Anna")} for row in north]
    before, after = jsonl(inside / "he.jsonl", north), jsonl(inside / "anna.jsonl", exchanged)
    found = evaluated("run", "--data", before, "--counterfactuals", "--exchanges", "list.tsv")["counterfactuals"]
    p = []
    for name in (before, after):
        assert evaluate.main(["run", "--data", name, "--out", f"{name}.out"]) == 0
        lines = Path(f"{name}.out").read_text().splitlines()
        p.append(np.array([list(json.loads(line)["probabilities"].values()) for line in lines]))
    [kind] = [kind for name, kind in found["kinds"].items() if name == "ours"]
    assert kind["amount"]["value"] == pytest.approx(np.abs(p[0] - p[1]).sum(1).mean() / 2, rel=1e-4)
    assert kind["changed"]["value"] == (p[0].argmax(1) != p[1].argmax(1)).mean()


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--data", "rows.jsonl", "--group-by", "age"],
            "rows.jsonl line 1 has no column 'age', only 'text', 'label'",
        ),
        (["--data", "yes.txt", "no.txt", "--group-by", "age"], "yes.txt has no columns, and so no 'age'"),
        (
            ["--data", "table.csv", "--group-by", "age"],
            "table.csv has no column 'age', only 'text'",
        ),
        (["--data", "new.jsonl"], "new.jsonl has the unknown label 'maybe': the classes are no, yes"),
        (["--exchanges", "list.tsv"], "--exchanges belongs to --counterfactuals"),
        (["--data", "yes.txt", "no.txt", "--counterfactuals"], "no text of this data has a word of the exchanges"),
        (["--against", "elsewhere"], "elsewhere is not a run folder"),
        (["--html", "rows.jsonl"], "rows.jsonl already exists: choose another --html"),
        (["--data", "rows.jsonl", "--against", "language"], "run reads texts, and language windows: compare"),
    ],
)
def test_a_mistake_of_items_is_one_sentence(
    flags: list[str], words: str, inside: Path, capsys: Any, shake: Callable[[Any], Any]
) -> None:
    for label in ("yes", "no"):
        (inside / f"{label}.txt").write_text("something\n")
    (inside / "table.csv").write_text("text,label,place\nHe was,yes,\n")
    jsonl(inside / "new.jsonl", [{"text": "a", "label": "maybe"}, {"text": "b", "label": "no"}])
    if not (inside / "language").exists():
        untrained_run(inside / "language", shake, "causal")
    assert words in refused(capsys, "run", *flags, main=evaluate.main)


@pytest.mark.unchecked_shapes
def test_choices_have_groups_another_run_exchanges_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shake: Callable[[Any], Any], capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        untrained_run(tmp_path / name, shake, "causal", context_length=60)
    rows = [
        {"question": f"Is {who} {n}?", "choices": ["yes", "no", "who"], "answer": n % 3, "about": who}
        for n in range(16)
        for who in ("Anna", "Zoe")
    ]
    flags = ["run", "--choices", "--data", jsonl(tmp_path / "items.jsonl", rows)]
    found = evaluated(*flags, "--group-by", "about", "--against", "other", "--counterfactuals", "--html", "page.html")
    said = capsys.readouterr().out
    lines = {}
    for name in ("run", "other"):
        assert evaluate.main([name, *flags[1:], "--out", f"{name}.out"]) == 0
        lines[name] = [json.loads(line) for line in Path(f"{name}.out").read_text().splitlines()]
    right = {name: np.array([line["chosen"]["sum"] == [line["answer"]] for line in of]) for name, of in lines.items()}
    groups = found["choices_by_group"]["choices_sum"]["values"]
    for place, who in enumerate(("Anna", "Zoe")):
        own = right["run"][place::2]
        assert groups[who]["items"] == 16
        assert groups[who]["choice_accuracy"]["value"] == own.mean()
        assert found["choices"]["groups"][who]["sum"]["accuracy"] == own.mean()
    assert found["choices_against"]["choices_sum"]["difference"]["value"] == pytest.approx(
        right["run"].mean() - right["other"].mean()
    )
    assert found["counterfactuals"]["kinds"]["names"]["variants"] == 16
    assert "Accuracy by about" in said
    page = Path("page.html").read_text()
    assert "Beside other, on the same 32 items" in page
    assert ("nats less" in page) == (not right["run"].all())
    assert "line 1 has no column 'age'" in refused(capsys, *flags, "--group-by", "age", main=evaluate.main)


@pytest.mark.unchecked_shapes
def test_the_rows_of_pairs_that_are_left_out_have_no_place_among_items(here: Path) -> None:
    texts = ["one", " ", "two " * 30, "three", "four"]
    rows = [{"source": text, "target": text or "x", "kind": str(n)} for n, text in enumerate(texts)]
    jsonl(here / "pairs.jsonl", rows * 3)
    flags = ["transformer-mini", "--data", "pairs.jsonl", *TINY, "--device", "cpu", "--steps", "1", "--out", "run"]
    assert train.main(flags) == 0
    run = Run.open(here / "run")
    whole = HeldOutData.of_files(run, ["pairs.jsonl"], None)
    assert whole.column("kind") == ["0", "3", "4"] * 3
    kinds = {row["source"]: row["kind"] for row in rows}
    exchanges = [Exchange("longer", "one", "o" * 40), Exchange("as long", "four", "five")]
    changed, variants = exchanged_data(whole, exchanges, here)
    assert [changed.text_of(number)["source"] for number in range(len(variants))] == ["five"] * 3
    assert variants == [Variant(item, exchanges[1]) for item in (2, 5, 8)]
    split = HeldOutData.of_run(run)
    found = split.column("kind")
    assert found
    assert found == [kinds[split.text_of(number)["source"]] for number in range(len(found))]


@pytest.mark.unchecked_shapes
def test_documents_of_running_text_are_grouped_by_a_column_of_their_rows(
    here: Path, shake: Callable[[Any], Any], capsys: Any
) -> None:
    untrained_run(here / "run", shake, "causal", context_length=8)
    rows = [{"text": f"{kind} {n} " * 9, "kind": kind} for n in range(9) for kind in ("law", "poem")]
    data = jsonl(here / "all.jsonl", [*rows, {"text": "short", "kind": "note"}])
    found = evaluated("run", "--data", data, "--group-by", "kind")["metrics_by_group"]
    assert found["values"].keys() == {"law", "poem"}
    assert "Without enough text for a window: note." in capsys.readouterr().out
    alone = evaluated("run", "--data", jsonl(here / "law.jsonl", [row for row in rows if row["kind"] == "law"]))
    assert found["values"]["law"]["bits_per_byte"] == alone["metrics"]["bits_per_byte"]
    assert found["gaps"]["bits_per_byte"]["value"] > 0
    assert "my.txt has no columns, and so no 'kind'" in refused(
        capsys, "run", "--data", "my.txt", "--group-by", "kind", main=evaluate.main
    )
    assert "windows, which are no rows of a file" in refused(
        capsys, "run", "--data", "my.txt", "--counterfactuals", main=evaluate.main
    )
