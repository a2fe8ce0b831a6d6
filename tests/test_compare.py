"""Runs beside each other: what is said of them, and what is not; tables, page and CSV file of the command."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from minitransformer.__main__ import main as minitransformer_main
from minitransformer.analysis.compare import compare, comparison_page
from minitransformer.commands import USAGE
from minitransformer.commands.compare import main
from minitransformer.errors import StorageError, UserError
from minitransformer.runs import Run
from minitransformer.text.tokenizers import Bytes
from tests.prepared_for_tests import fitted
from tests.runs_for_tests import configured, prepared_text, trainer_for, unsealed

STEPS, NUMBERS, TOKENIZER = (4, 8, 12), ("validation_loss", "bits_per_byte"), Bytes()


@pytest.fixture
def make(tmp_path):
    """Makes a run folder with numbers of our own: validation losses at 4, 8 and 12 steps, two tokens and ⅒ s a step."""

    def run(name, losses=(3.0, 2.0, 1.0), *, text="text", tokenizer=TOKENIZER, numbers=NUMBERS, **choices):
        path = tmp_path / name
        Run.create(path, configured(**choices), tokenizer, tokenizer, text)
        records = []
        for step, loss in zip(STEPS, losses, strict=False):
            records.append({"step": step, "loss": loss + 0.5, "tokens": 2 * step, "seconds": step / 10})
            records.append({"step": step, **dict.fromkeys(numbers, loss), "accuracy": None})
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    return run


def of_seeds(make, residual, lasts):
    return [make(f"{residual}-{seed}", (4.0, 3.0, x), residual=residual, seed=seed) for seed, x in enumerate(lasts)]


@pytest.fixture
def placements(make):
    """Post and pre with five seeds each, of which pre is clearly better."""
    return of_seeds(make, "post", (2.0, 2.1, 2.2, 2.3, 1.9)) + of_seeds(make, "pre", (1.5, 1.61, 1.7, 1.8, 1.4))


def said(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_runs_that_differ_in_seed_only_are_one_group(placements):
    groups = compare(placements).groups
    assert [(group.label, group.seeds) for group in groups] == [
        ("placement post", [0, 1, 2, 3, 4]),
        ("placement pre", [0, 1, 2, 3, 4]),
    ]


def test_no_group_is_called_residual_residual(make):
    groups = compare([make("a", residual="pre"), make("b", residual="residual")]).groups
    assert [group.label for group in groups] == ["placement pre", "placement residual"]


def test_what_differs_is_told_and_nothing_else(placements):
    assert compare(placements).differences().rows == [["residual", "post", "pre"]]


def test_results_are_means_over_seeds_with_half_of_the_interval(placements):
    rows = {row[0]: row[1:] for row in compare(placements).results().rows}
    # Student's t with four degrees of freedom: 2.776 · 0.158 / √5.
    assert rows["last validation loss"][0] == "2.10 ± 0.20"
    assert rows["steps"] == [12, 12]
    assert rows["tokens per second"] == [20, 20]
    assert "accuracy" not in rows


def test_the_best_loss_is_the_lowest_and_the_last_one_the_last(make):
    rows = {row[0]: row[1] for row in compare([make("a", (3.0, 1.0, 2.0))]).results().rows}
    assert (rows["best validation loss"], rows["last validation loss"]) == (1, 2)


def test_a_winner_is_named_where_seeds_bear_it_out(placements):
    comparison = compare(placements)
    assert comparison.ranking.winner == "placement pre"
    (pair,) = comparison.ranking.comparisons
    assert pair.difference.mean == pytest.approx(-0.498, abs=1e-4)
    assert "placement pre is best" in comparison.verdict


def test_no_winner_is_named_where_the_interval_covers_zero(make):
    paths = of_seeds(make, "post", (1.0, 2.0, 3.0, 1.0, 2.0)) + of_seeds(make, "pre", (1.1, 1.5, 3.2, 1.2, 1.7))
    comparison = compare(paths)
    assert comparison.ranking.winner is None
    assert "No winner" in comparison.verdict


def test_four_seeds_name_no_winner_however_far_apart(make):
    lasts = [1.0, 1.1, 1.2, 1.3]
    paths = of_seeds(make, "post", lasts) + of_seeds(make, "pre", [x + 9 for x in lasts])
    assert "No winner: 4 seeds are fewer than the 5 required" in compare(paths).verdict


def test_a_difference_below_the_smallest_worth_naming_names_no_winner(make, capsys):
    lasts = [1.0, 1.1, 1.2, 1.3, 1.4]
    paths = of_seeds(make, "post", lasts) + of_seeds(make, "pre", [x + 1e-3 for x in lasts])
    assert "placement post differs from placement pre by less than 0.002" in compare(paths).verdict
    assert "placement post is best" in compare(paths, smallest_difference=5e-4).verdict
    shown = " ".join(said(capsys, *paths, "--smallest-difference", "0.0005").split())
    assert "placement post is best" in shown
    with pytest.raises(UserError, match="smallest-difference is -1"):
        compare(paths, smallest_difference=-1)


def test_one_seed_each_names_no_winner(make):
    comparison = compare([make("a", residual="post"), make("b", (9.0, 9.0, 9.0), residual="pre")])
    assert comparison.ranking is None
    assert "only seed 0" in comparison.verdict


def test_seeds_are_paired_by_their_number_and_those_of_one_side_left_out(make):
    paths = [make(f"a{seed}", (4, 3, 1.0 + seed), residual="post", seed=seed) for seed in (3, 1, 2)]
    paths += [make(f"b{seed}", (4, 3, 0.5 + seed * 1.01), residual="pre", seed=seed) for seed in (2, 7, 3)]
    comparison = compare(paths)
    assert comparison.ranking.seeds == 2
    (pair,) = comparison.ranking.comparisons
    assert abs(pair.difference.mean) == pytest.approx(0.475)
    assert "seeds 2, 3" in comparison.verdict


def test_the_same_run_twice_adds_no_seed(make):
    first, again = make("a"), make("again")
    comparison = compare([first, again, first])
    assert [len(group.histories) for group in comparison.groups] == [1]
    assert sum("is left out" in remark for remark in comparison.remarks) == 2


def test_bands_are_over_seeds_at_the_steps_that_all_have(make):
    paths = [make("a", (3.0, 2.0, 1.0), seed=0), make("b", (4.0, 3.0), seed=1)]
    (curve,) = compare(paths).curves("validation_loss")
    assert list(curve.x) == [4, 8]
    assert list(curve.mean) == [3.5, 2.5]
    assert curve.low[0] < 3.0


@pytest.mark.parametrize(("by", "x"), [("step", [4, 8, 12]), ("tokens", [8, 16, 24]), ("seconds", [0.4, 0.8, 1.2])])
def test_curves_run_over_steps_tokens_or_seconds(make, by, x):
    (curve,) = compare([make("a")], by=by).curves("validation_loss")
    assert curve.x == pytest.approx(x)
    assert curve.low is None


def test_other_tokenizers_are_compared_by_bits_per_byte(make):
    chars = fitted("chars", "abc")
    paths = [make("bytes", text="one"), make("chars", text="two", tokenizer=chars, vocab_size=300)]
    comparison = compare(paths)
    assert comparison.metric == "bits_per_byte"
    assert any("different tokenizers" in remark for remark in comparison.remarks)
    assert not comparison.losses_comparable


def test_vocabularies_for_each_side_are_other_tokenizers_of_the_same_text(make):
    pairs = {"topology": "encoder-decoder", "objective": "seq2seq"}
    shared = make("shared", text="one", **pairs)
    separate = make("separate", text="two", tokenizer=fitted("chars", "abc"), **pairs, separate_vocabularies=True)
    assert any("different tokenizers" in remark for remark in compare([shared, separate]).remarks)


def test_other_data_are_never_a_contest(make):
    paths = [make(f"{data}{seed}", text=data, data=data, seed=seed) for data in "xy" for seed in (0, 1)]
    comparison = compare(paths)
    assert comparison.metric == "bits_per_byte"
    assert comparison.ranking is None
    assert any("different data" in remark for remark in comparison.remarks)


def test_a_metric_of_one_s_own_is_compared_but_has_no_better(make):
    choices = [(residual, seed) for residual in ("post", "pre") for seed in (0, 1)]
    paths = [make(f"{r}{s}", (3, 2, s), residual=r, seed=s, numbers=("omega",)) for r, s in choices]
    comparison = compare(paths, metric="omega")
    assert comparison.pairs() is not None
    assert "it is unknown whether" in comparison.verdict
    assert "last omega" in [row[0] for row in comparison.results().rows]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest(make):
    with pytest.raises(UserError, match="did you mean 'validation_loss'"):
        compare([make("a")], metric="validation_los")


def test_damaged_lines_are_left_out_counted_and_said(make):
    path = make("a")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 16, "validation_lo\n\xff\xfe\n[1]\n{"loss": 3}\n')
    comparison = compare([path])
    assert any("4 damaged lines left out" in remark for remark in comparison.remarks)
    assert comparison.groups[0].histories[0].steps == 12


def test_a_run_without_numbers_is_refused(make):
    path = make("a")
    for content in ("", "nothing\n"):
        (path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"a has no metrics in metrics\.jsonl"):
            compare([path])
    (path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"a has no metrics in metrics\.jsonl"):
        compare([path])


def test_a_folder_that_is_no_run_and_no_folder_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        compare([tmp_path])
    with pytest.raises(UserError, match="give two or more run folders"):
        compare([])


def test_runs_that_diverged_are_drawn_and_win_nothing(make):
    choices = [(residual, seed) for residual in ("post", "pre") for seed in (0, 1)]
    paths = [make(f"{r}{s}", (3, 2, math.nan if r == "post" else 1.0), residual=r, seed=s) for r, s in choices]
    comparison = compare(paths)
    assert comparison.ranking.winner is None
    assert all(picture.draw() for picture in comparison.pictures())


def test_runs_of_versions_with_other_settings_are_compared(make):
    new, old = make("new"), make("old", residual="post")
    config = unsealed(old / "config.json")
    del config["model"]["dropout"]
    config["training"]["forgotten"] = 3
    (old / "config.json").write_text(json.dumps(config))
    rows = {row[0]: row[1:] for row in compare([new, old]).differences().rows}
    assert rows["dropout"][1] is None
    assert rows["forgotten"] == [None, 3]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {}, "data": {}, "training": {}}'])
def test_a_damaged_configuration_is_refused(make, content):
    path = make("a")
    (path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json .*leave the run out"):
        compare([path])


def test_a_run_whose_settings_were_changed_is_not_compared(make):
    copy = make("one")
    content = (copy / "config.json").read_text()
    (copy / "config.json").write_text(content.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(StorageError, match="was changed after training"):
        compare([copy])


def test_runs_of_different_code_are_told(make):
    paths = [make("a"), make("b", residual="post")]
    config = unsealed(paths[0] / "config.json")
    config["provenance"]["commit"] = "older"
    (paths[0] / "config.json").write_text(json.dumps(config))
    assert any("different versions of the code: older" in remark for remark in compare(paths).remarks)


def test_comparing_starts_without_loading_torch():
    code = "import sys, minitransformer.commands.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_a_run_that_is_not_done_says_so(make):
    comparison = compare([make("a", (3.0, 2.0))])
    assert any("is unfinished: 8 of 12 steps" in remark for remark in comparison.remarks)


def test_many_settings_are_named_by_their_folders_or_by_number(make):
    small, large = {"lr": 0.01, "batch_size": 2, "dropout": 0.1}, {"lr": 0.02, "batch_size": 4, "dropout": 0.2}
    paths = [make("small-0", **small), make("large-0", **large), make("small-1", seed=1, **small)]
    assert [group.label for group in compare(paths).groups] == ["small", "large-0"]
    other = make("a_name_that_is_much_too_long_for_a_column", lr=0.03, batch_size=8)
    assert [group.label for group in compare([*paths, other]).groups] == ["group 1", "group 2", "group 3"]


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
