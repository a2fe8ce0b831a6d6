"""`compare` on the command line: its tables, its page, its CSV file, its mistakes."""

import csv
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from minitransformer.__main__ import main as minitransformer_main
from minitransformer.analysis.compare import compare, comparison_page
from minitransformer.commands import USAGE
from minitransformer.commands.compare import main
from tests.comparing_for_tests import placement_runs, run_maker, said
from tests.runs_for_tests import configured, prepared_text, trainer_for, unsealed


@pytest.fixture
def make(tmp_path):
    return run_maker(tmp_path)


@pytest.fixture
def placements(make):
    return placement_runs(make)


def test_the_command_shows_a_table_a_plot_and_a_verdict_in_eighty_columns(placements, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, *placements)
    for wanted in ("last validation loss", "o placement post", "x placement pre", "Paired differences", "is best"):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_is_one_file_with_pictures_and_escaped_names(placements, tmp_path, capsys):
    target = tmp_path / "new" / "page.html"
    assert f"written    {target}" in said(capsys, *placements, "--html", target)
    html = target.read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "placement pre is best" in html
    assert "minitransformer compare" in html


def test_the_page_of_a_single_run_is_written(make):
    assert "there is nothing to compare" in comparison_page(compare([make("a")]), "command", Path())


def test_the_page_leads_to_its_runs_and_its_table(placements, tmp_path, capsys):
    target, table = tmp_path / "pages" / "page.html", tmp_path / "runs of mine.csv"
    said(capsys, *placements, "--html", target, "--csv", table)
    paths = {unquote(path) for path in re.findall(r'href="([^"]*)"', target.read_text())}
    assert {(target.parent / path).resolve() for path in paths} == {*(run.resolve() for run in placements), table}


def test_training_and_validation_of_a_single_run_are_in_one_figure(make, capsys):
    path = make("a", (3.0, 1.0, 2.0))
    [picture] = compare([path]).pictures()
    assert picture.title == "Training and validation loss"
    [axes] = picture.draw().axes
    assert [list(line.get_ydata()) for line in axes.lines][:2] == [[3.5, 1.5, 2.5], [3.0, 1.0, 2.0]]
    text = said(capsys, path)
    assert "o training" in text
    assert "x validation" in text


def test_it_is_said_where_validations_have_read_a_part(make):
    path = make("a")
    assert not any("a part" in remark for remark in compare([path]).remarks)
    with (path / "metrics.jsonl").open("a") as file:
        for step, tokens in ((13, 100), (14, 1000)):
            file.write(json.dumps({"step": step, "validation_loss": 1.0, "validation_tokens": tokens}) + "\n")
    assert any("earlier ones (and so perhaps the best) a subset" in remark for remark in compare([path]).remarks)


def test_the_table_has_one_row_for_each_run(placements, tmp_path, capsys):
    said(capsys, *placements, "--csv", tmp_path / "runs.csv")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(row["residual"], row["seed"]) for row in rows] == [(r, s) for r in ("post", "pre") for s in "01234"]
    assert float(rows[6]["last_validation_loss"]) == 1.61


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_real_runs_compare_from_the_command_line(tmp_path, capsys, monkeypatch):
    text = prepared_text(tmp_path)
    for residual in ("post", "pre"):
        config = configured(residual=residual, steps=4, eval_every=2, save_every=4)
        trainer_for(tmp_path / residual, text, config).train()
    monkeypatch.setattr(sys, "argv", ["minitransformer", "compare", *map(str, sorted(tmp_path.glob("p*")))])
    assert minitransformer_main() == 0
    shown = capsys.readouterr().out
    assert "o placement post" in shown
    assert "bits per byte" in shown
    assert "only seed 0" in shown


def test_what_only_looks_on_makes_no_group_of_its_own(make):
    paths = [make("a"), make("b", probe=("gradient-norm",), probe_every=5, log_every=3, seed=1)]
    comparison = compare(paths)
    assert len(comparison.groups) == 1
    assert comparison.differences().rows == []


def test_whose_weights_a_run_began_with_is_a_difference_and_tells_groups_apart(make):
    scratch, tuned, again = make("scratch"), make("tuned"), make("again", seed=1)
    for path in (tuned, again):
        record = unsealed(path / "config.json")
        record["parent"] = {"path": "runs/gpt", "checkpoint": "step-000750", "sha256": "0123456789abcdef"}
        (path / "config.json").write_text(json.dumps(record))
    comparison = compare([scratch, tuned, again])
    assert [len(group.histories) for group in comparison.groups] == [1, 2]
    assert comparison.differences().rows == [["parent", None, "gpt step-000750 (01234567)"]]


def test_a_setting_that_an_older_run_does_not_have_is_the_same_as_none(make):
    old, new = make("old"), make("new", seed=1)
    record = unsealed(old / "config.json")
    del record["training"]["sequence_length"]
    (old / "config.json").write_text(json.dumps(record))
    assert len(compare([old, new]).groups) == 1


def test_precisions_that_auto_came_to_are_said_where_they_differ(make):
    paths = [make("a"), make("b", seed=1)]
    for path, precision in zip(paths, ("bf16", "fp32"), strict=True):
        record = unsealed(path / "config.json")
        record["machine"] = {"device": "cpu", "precision": precision, "compile": False}
        (path / "config.json").write_text(json.dumps(record))
    said = "The runs were trained in different precisions on different machines: bf16, fp32."
    assert said in compare(paths).remarks
    assert said not in compare(paths[:1]).remarks
