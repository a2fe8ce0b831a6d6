"""`evaluate`: the metrics of a run on its validation data and on other data, and the mistakes of its user."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import evaluate, train
from minitransformer.runs import Run
from tests.runs_for_tests import TEXT, refused

TINY = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--tokenizer", "bytes"]


def trained(out: Path, *flags: str) -> Run:
    assert train.main([*flags, *TINY, "--device", "cpu", "--precision", "fp32", "--steps", "2", "--out", str(out)]) == 0
    return Run.open(out)


def evaluated(run: Run, *flags: str) -> dict[str, Any]:
    assert evaluate.main([str(run.path), "--json", "found.json", *flags]) == 0
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    Path("found.json").unlink()
    return found


@pytest.fixture
def language_model(here: Path) -> Run:
    (here / "other.txt").write_text(" ".join(TEXT[:300].split()))
    return trained(here / "run", "gpt-nano", "--data", "my.txt")


@pytest.mark.unchecked_shapes
def test_on_its_validation_data_it_has_the_figures_of_the_end_of_training(language_model: Run, capsys: Any) -> None:
    told = json.loads((language_model.path / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    found = evaluated(language_model, "--checkpoint", "latest")
    values = {name: each["value"] for name, each in found["metrics"].items() if name != "items"}
    assert values == {name: pytest.approx(told[name], rel=1e-5) for name in values}
    assert values.keys() == {"validation_loss", "perplexity", "bits_per_byte"}
    assert f"loss  {told['validation_loss']:.4f}" in capsys.readouterr().out
    assert found["data"] == "my.txt, validation"


@pytest.mark.unchecked_shapes
def test_the_loss_of_other_text_is_that_of_all_of_its_tokens_by_hand(language_model: Run) -> None:
    found = evaluated(language_model, "--data", "other.txt")["metrics"]
    tokenizer, text = language_model.tokenizer, Path("other.txt").read_text()
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)])
    model, nats = language_model.load_model(), 0.0
    for begin in range(0, len(ids) - 1, 16):
        window = ids[begin : begin + 17]
        log_p = model(window[None, :-1])[0].log_softmax(-1).detach()
        nats -= float(log_p.gather(1, window[1:, None]).sum())
    assert found["validation_loss"]["value"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.unchecked_shapes
def test_a_classifier_and_a_translator_are_evaluated_on_files(here: Path, capsys: Any) -> None:
    rows = [f"text {number} is {'odd' if number % 2 else 'even'}" for number in range(40)]
    (here / "labels.tsv").write_text("text\tlabel\n" + "".join(f"{row}\t{row.split()[-1]}\n" for row in rows))
    classifier = trained(here / "classes", "bert-mini", "--objective", "classify", "--data", "labels.tsv")
    found = evaluated(classifier, "--data", "labels.tsv", "--out", "classes.jsonl")
    rows = [json.loads(line) for line in (here / "classes.jsonl").read_text().splitlines()]
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert found["metrics"]["accuracy"]["value"] == right / len(rows) == right / 40
    assert all(row["text"].startswith(f"text {number} is") for number, row in enumerate(rows))
    by_hand = [-math.log(row["probabilities"][row["label"]]) for row in rows]
    assert [row["nats"] for row in rows] == pytest.approx(by_hand, rel=1e-4)
    assert sum(map(sum, found["classes"]["confusion"])) == 40
    assert "class  texts" in capsys.readouterr().out
    (here / "a.txt").write_text("one two\nthree\n" * 20)
    (here / "b.txt").write_text("eins zwei\ndrei\n" * 20)
    translator = trained(here / "pairs", "transformer-mini", "--data", "a.txt", "--target-data", "b.txt")
    flags = ["--data", "a.txt", "--target-data", "b.txt"]
    found = evaluated(translator, *flags, "--num-beams", "2", "--out", "outputs.jsonl")
    assert found["metrics"]["validation_loss"]["value"] > 0
    assert found["outputs"]["num_beams"] == 2
    rows = [json.loads(line) for line in (here / "outputs.jsonl").read_text().splitlines()]
    assert {(row["source"], row["reference"]) for row in rows} == {("one two", "eins zwei"), ("three", "drei")}
    assert [row["item"] for row in rows] == list(range(40))
    assert "Outputs for 40 sources, by 2 beams." in capsys.readouterr().out.splitlines()
    assert "stride is for models that predict the next token" in refused(
        capsys, "classes", "--data", "labels.tsv", "--stride", "8", main=evaluate.main
    )


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "0"], "batch_size is 0: it must be at least 1"),
        (["--stride", "0"], "stride is 0: it must be at least 1"),
        (["--stride", "17"], "stride is 17, and the windows have 16 tokens: choose at most as many"),
        (["--json", "my.txt"], "my.txt already exists: choose another --json"),
        (["--json", "new", "--html", "./new"], "new is named twice: choose another --html"),
        (["--target-data", "my.txt"], "give --data too, or leave it out"),
        (["--data", "my.txt", "--target-data", "my.txt"], "target_data is for pairs, and the data of the run is text"),
        (["--num-beams", "2"], "--num-beams has no effect on data without questions: leave it out"),
        (["--data", "no.txt"], "no file, folder or recipe 'no.txt'"),
    ],
)
def test_a_mistake_is_one_sentence(language_model: Run, flags: list[str], words: str, capsys: Any) -> None:
    capsys.readouterr()
    assert words in refused(capsys, "run", *flags, main=evaluate.main)


@pytest.mark.unchecked_shapes
def test_validation_data_that_has_changed_since_training_is_refused(language_model: Run, capsys: Any) -> None:
    Path("my.txt").write_text(TEXT + TEXT)
    capsys.readouterr()
    assert "my.txt is not the text that run started with" in refused(capsys, "run", main=evaluate.main)


@pytest.mark.unchecked_shapes
def test_an_import_has_no_validation_data(language_model: Run, capsys: Any) -> None:
    tokenizers = [language_model.tokenizer] * 2
    Run.create(Path("import"), language_model.config, *tokenizers, initial=language_model.load_model())
    capsys.readouterr()
    assert "import was imported, and has no validation data" in refused(capsys, "import", main=evaluate.main)


@pytest.mark.unchecked_shapes
def test_a_run_without_validation_data_asks_for_some(here: Path, capsys: Any) -> None:
    trained(here / "run", "gpt-nano", "--data", "my.txt", "--validation-fraction", "0")
    capsys.readouterr()
    assert "run has no validation data: name a file with --data" in refused(capsys, "run", main=evaluate.main)
