"""Classification: labelled data of every form, its mistakes, the loss, a new head on a trained body, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitransformer.commands import doctor, merge, sample, train, verify_resume
from minitransformer.errors import UserError
from minitransformer.evaluation.intervals import bootstrap_interval, macro_f1, wilson_interval
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.runs.begin import body_of
from minitransformer.text.datasets.label_preparation import PreparedLabels
from minitransformer.text.labels import open_labels
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.loader import Loader
from tests.runs_for_tests import assert_same_weights, configured, saved_weights

TINY = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "32", "--tokenizer", "bytes"]
ROWS = [(f"{i} runs", "odd") if i % 2 else (f"dog {i}", "even") for i in range(80)]


def table(path: Path, rows: list[tuple[str, str]], delimiter: str = "\t") -> Path:
    path.write_text("".join(f"{text}{delimiter}{label}\n" for text, label in [("text", "label"), *rows]))
    return path


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path


def config_of(data: Path, **choices: Any) -> RunConfig:
    start = {"objective": "classify", "topology": "encoder-classifier", "vocab_size": None, "context_length": 32}
    return configured(**{**start, "data": str(data), **choices})


def prepared_of(data: Path, **choices: Any) -> PreparedLabels:
    prepared = config_of(data, **choices).prepare()
    assert isinstance(prepared, PreparedLabels)
    return prepared


def as_tsv(folder: Path) -> Path:
    return table(folder / "rows.tsv", ROWS)


def as_csv(folder: Path) -> Path:
    return table(folder / "rows.csv", ROWS, ",")


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    return path


def as_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    for name in ("odd", "even"):
        lines = (f"{text}\n" for text, label in ROWS if label == name)
        (folder / "files" / f"{name}.txt").write_text("".join(lines))
    return folder / "files"


def as_folders(folder: Path) -> Path:
    for number, (text, label) in enumerate(ROWS):
        (folder / "folders" / label).mkdir(parents=True, exist_ok=True)
        (folder / "folders" / label / f"{number}.txt").write_text(text)
    return folder / "folders"


@pytest.mark.parametrize("write", [as_tsv, as_csv, as_jsonl, as_files, as_folders])
def test_the_same_texts_are_read_from_every_form(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = list(open_labels(str(write(tmp_path))).pairs())
    assert sorted(map(tuple, found)) == sorted(ROWS)


def test_latin_1_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    for name, text in (("good", "caf\xe9\n"), ("bad", "t\xe9\x85 x\n")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode("latin-1") * 3)
    files = [str(tmp_path / "bad.txt"), str(tmp_path / "good.txt")]
    assert list(open_labels(files, encoding="latin-1").pairs())[-1] == ("caf\xe9", "good")
    assert len(list(open_labels(files, encoding="latin-1").pairs())) == 6
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 at byte 1 \(0xe9\): choose another --encoding, such as"):
        open_labels(files)


@pytest.mark.parametrize(
    ("rows", "choices", "message"),
    [
        ([("a", "x"), ("b", "x")], {}, "has one class only, 'x': give texts of two"),
        (ROWS, {"classes": ("even", "none", "odd")}, "class 'none' has no example to train on"),
        (ROWS, {"classes": ("even", "other")}, "has the unknown label 'odd': the classes are even, other; correct it"),
        ([("a", "x"), ("b", "")], {}, "has no label in row 2: give each row a 'label'"),
        (ROWS, {"label_field": "kind"}, "has no column 'kind'.*--label-field for labels"),
        (ROWS, {"num_classes": 3}, "num_classes is 3, and the data has 2 classes"),
    ],
)
def test_a_mistake_in_labels_is_one_sentence(
    rows: list[tuple[str, str]], choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_of(table(tmp_path / "rows.tsv", rows), **choices)
    with pytest.raises(UserError, match=message):
        with_vocabulary(config.model, config.prepare())


def test_an_empty_table_is_said_to_name_no_column(tmp_path: Path) -> None:
    empty = tmp_path / "empty.tsv"
    empty.write_text("")
    with pytest.raises(UserError, match="has no column 'text': its first line names none; choose one"):
        prepared_of(as_tsv(tmp_path), validation_data=str(empty))


def test_an_unknown_label_in_validation_is_refused(tmp_path: Path) -> None:
    other = table(tmp_path / "other.tsv", [("7", "odd"), ("8", "prime")])
    with pytest.raises(UserError, match=r"other.tsv has the unknown label 'prime': the classes are even, odd"):
        prepared_of(as_tsv(tmp_path), validation_data=str(other))


def test_a_text_is_framed_and_its_target_is_the_place_of_its_label(tmp_path: Path) -> None:
    data = prepared_of(as_tsv(tmp_path), classes=("odd", "even"), validation_fraction=0.0)
    config = config_of(as_tsv(tmp_path), classes=("odd", "even"), validation_fraction=0.0)
    [batch, *_] = Loader.of_run(config, data).training_batches(0)
    for text, is_token, target in zip(batch.inputs, batch.is_token, batch.targets, strict=True):
        end, *inside, last = text[is_token].tolist()
        assert end == last == data.tokenizer.end_of_text
        assert (data.tokenizer.decode(inside), ("odd", "even")[target]) in ROWS


@pytest.mark.parametrize("topology", ["encoder-classifier", "decoder-classifier"])
def test_balanced_weights_let_every_class_count_alike(topology: str, tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i < 5 else "common") for i in range(40)]
    config = config_of(
        table(tmp_path / "rows.tsv", rows), topology=topology, class_weights="balanced", validation_fraction=0.0
    )
    data = config.prepare()
    config = RunConfig(with_vocabulary(config.model, data), config.data, config.training)
    [batch] = Loader.of_run(config, data).training_batches(0)
    sums = [batch.weights[batch.targets == number].sum().item() for number in (0, 1)]
    assert sums == pytest.approx([20.0, 20.0])
    model, objective = build_model(config.model).eval(), Loader.of_run(config, data).objective
    logits = model(batch.inputs, is_token=batch.is_token)
    by_hand = -sum(w * z.log_softmax(-1)[y] for w, z, y in zip(batch.weights, logits, batch.targets, strict=True))
    assert objective.loss_sum(model, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("pooled", ["first", "mean"])
@pytest.mark.parametrize("topology", ["encoder-classifier", "decoder-classifier"])
def test_padding_changes_no_class(topology: str, pooled: str) -> None:
    choices = {"pooled": pooled} if topology == "encoder-classifier" else {}
    model = build_model(configured(topology=topology, objective="classify", num_classes=3, **choices).model).eval()
    text = torch.randint(0, 250, (1, 6))
    padded, is_token = torch.cat([text, torch.zeros(1, 4, dtype=torch.long)], 1), torch.arange(10)[None] < 6
    torch.testing.assert_close(model(padded, is_token=is_token), model(text), rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_their_definitions() -> None:
    confusion = np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]])
    f1 = [2 * 8 / (10 + 9), 2 * 4 / (5 + 6), 0]
    assert macro_f1(confusion) == pytest.approx(sum(f1) / 3)
    low, high = bootstrap_interval(macro_f1, confusion)
    assert low < macro_f1(confusion) < high
    assert bootstrap_interval(macro_f1, confusion) == (low, high)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


@pytest.mark.parametrize(
    ("preset", "objective", "choices"),
    [("bert-mini", "masked", ["--pooled", "mean"]), ("gpt-nano", "causal", [])],
)
def test_a_classifier_keeps_the_body_of_what_it_starts_from_learns_and_names_classes(
    preset: str, objective: str, choices: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} runs, dog {i}.\n" for i in range(200)))
    parent, tuned, data = str(tmp_path / "parent"), str(tmp_path / "tuned"), str(as_tsv(tmp_path))
    first = [preset, *TINY, "--objective", objective, "--data", str(tmp_path / "text.txt"), "--steps", "3"]
    assert train.main([*first, "--out", parent]) == 0
    start = ["--init-from", parent, "--objective", "classify", "--data", data, "--lr", "1e-2", *choices]
    assert train.main([*start, "--steps", "30", "--keep-last", "9", "--out", tuned]) == 0
    run = Run.open(Path(tuned))
    assert run.class_names == ["even", "odd"]
    before, started = Run.open(Path(parent)).load_model("best"), run.load_model("step-000000")
    assert all(torch.equal(started.state_dict()[name], weight) for name, weight in body_of(before).items())
    told = json.loads((Path(tuned) / "metrics.jsonl").read_text().splitlines()[-1])
    assert told["accuracy"] == told["macro_f1"] == 1.0
    assert told["accuracy_low"] < 1.0
    capsys.readouterr()
    assert sample.main([tuned, "--prompt", "dog 6\n5 runs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["even", "odd"]
    assert sample.main([tuned, "--prompt", "dog 6", "--num-samples", "2"]) == 2


def test_a_classifier_is_rehearsed_and_resumes_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["bert-mini", *TINY, "--objective", "classify", "--data", str(as_tsv(tmp_path)), "--steps", "6"]
    assert doctor.main(flags) == 0
    assert verify_resume.main(flags) == 0


@pytest.mark.parametrize(("preset", "objective"), [("bert-mini", "masked"), ("gpt-nano", "causal")])
@pytest.mark.parametrize("adapter", ["lora", "soft-prompt"])
def test_an_adapter_learns_with_a_new_head_and_both_are_stored_alone(
    preset: str, objective: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} runs, dog {i}.\n" for i in range(200)))
    parent, tuned, data = str(tmp_path / "parent"), str(tmp_path / "tuned"), str(as_tsv(tmp_path))
    first = [preset, *TINY, "--objective", objective, "--data", str(tmp_path / "text.txt"), "--steps", "3"]
    assert train.main([*first, "--out", parent]) == 0
    start = ["--init-from", parent, "--objective", "classify", "--data", data, "--lr", "1e-1", "--adapter", adapter]
    assert train.main([*start, "--steps", "6", "--save-every", "3", "--out", tuned]) == 0
    run = Run.open(Path(tuned))
    of_adapter = {"embedding.prompt"} if adapter == "soft-prompt" else set()
    names = set(saved_weights(run.path))
    assert {name for name in names if ".lora." not in name} == of_adapter | {
        f"head.{map}.{weight}" for map in ("pool", "classify") for weight in ("weight", "bias")
    }
    before, after = Run.open(Path(parent)).load_model("best").state_dict(), run.load_model("latest").state_dict()
    assert torch.equal(before["embedding.table.weight"], after["embedding.table.weight"])
    parts = [*start, "--save-every", "3", "--schedule", "constant"]
    assert train.main([*parts, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*parts, "--steps", "3", "--out", str(tmp_path / "half")]) == 0
    assert train.main(["--resume", str(tmp_path / "half"), "--steps", "6"]) == 0
    assert_same_weights(saved_weights(tmp_path / "whole"), saved_weights(tmp_path / "half"))
    capsys.readouterr()
    assert sample.main([tuned, "--prompt", "dog 6"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] != []
    merging = merge.main([tuned, "--out", str(tmp_path / "merged")])
    if adapter == "soft-prompt":
        assert merging == 2
        return
    assert merging == 0
    assert sample.main([str(tmp_path / "merged"), "--prompt", "dog 6"]) == 0
