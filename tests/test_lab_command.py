"""`lab` as its users meet it: what it says, which exit code it has, and the report that it leaves."""

import base64
import csv
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from minitransformer.commands import lab
from minitransformer.lab.experiment import Criterion, Experiment, ExperimentSettings, Findings
from minitransformer.lab.report import KNOWN_RULE, TRIAL_RULE, lab_command, write_lab_report
from minitransformer.lab.runner import ExperimentFolder
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Failure
from tests.lab_for_tests import Toy

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marks").mkdir()
    return tmp_path


def run(*arguments):
    return lab.main([*arguments, "--data", "marks", "--processes", "1"])


@pytest.fixture
def only_toys(monkeypatch):
    toys = {name: kind for name, kind in Experiment.registry.items() if name.startswith("toy")}
    monkeypatch.setattr(Experiment, "registry", toys)


class References(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.found, self.words, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "poster")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(filter(None, self.words))


def drawn():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    return figure


FINDINGS = Findings(
    criteria=[
        Criterion("a < b & c", "1 < 2", True),
        Criterion("known and wrong", "no", False),
        Criterion("known and open", "?", None),
        Criterion("tried and true", "yes", True, must_hold=False),
        Criterion("tried and wrong", "no", False, must_hold=False),
        Criterion("tried and open", "?", None, must_hold=False),
    ],
    tables=[
        Table("Loss: by depth", ["depth", "loss, mean"], [(2, 0.1 + 0.2), (4, None), (8, math.inf), (16, 'a "b"')]),
        Table("Loss by depth", ["n"], [[n] for n in range(300)]),
    ],
    pictures=[Picture("A line", drawn, "It rises.")],
    remarks=["All is <well> (arXiv 2002.04745)."],
)


@pytest.fixture
def report(tmp_path):
    """A report on an incomplete sweep with a damaged line and a failure, and its folder."""
    folder = tmp_path / "toy"
    run = ExperimentFolder(folder, Toy(ExperimentSettings(data=str(tmp_path))))
    run.write_record()
    for task in run.asked()[:4]:
        run.store.add(task, {"square": 1}, 90.0)
    with run.store.path.open("a") as file:
        file.write('{"key": "cut')
    run = ExperimentFolder(folder, Toy(ExperimentSettings(data=str(tmp_path))))
    path = write_lab_report(run, FINDINGS, [Failure({"number": 5, "seed": 1}, "ValueError: none")])
    return path, References(path.read_text())


def test_the_report_states_how_it_was_decided(report):
    _, page = report
    assert KNOWN_RULE in page.text
    assert TRIAL_RULE in page.text


def test_a_report_is_one_file_that_loads_no_other(report):
    path, page = report
    assert page.open == []
    (picture,) = [reference for reference in page.found if reference.startswith("data:")]
    kind, _, data = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (path.parent / "a-line.png").read_bytes()
    assert base64.b64decode(data).startswith(PNG)
    assert not re.search(r"src=\"(?!data:)|url\(|@import", path.read_text())


def test_a_report_leads_to_its_tables_its_figures_its_results_and_the_papers(report):
    path, page = report
    links = {reference for reference in page.found if not reference.startswith("data:")}
    papers = {link for link in links if link.startswith("https:")}
    assert papers == {"https://arxiv.org/abs/2002.04745"}
    assert links - papers == {"loss-by-depth.csv", "loss-by-depth-2.csv", "a-line.png", "results.jsonl"}
    assert all((path.parent / link).exists() for link in links - papers)


def test_a_report_says_what_was_asked_and_how_every_claim_came_out(report):
    _, page = report
    for words in (Toy.title, Toy.question, Toy.source, "A line. It rises.", "All is <well>"):
        assert words in page.text
    for outcome, claim in [
        *(("passed", "a < b & c"), ("FAILED", "known and wrong"), ("open", "known and open")),
        *(("holds", "tried and true"), ("does not hold", "tried and wrong"), ("open", "tried and open")),
    ]:
        assert f"{outcome} {claim}" in page.text
    assert "1 passed, 1 FAILED, 1 open." in page.text
    assert "1 holds, 1 does not hold, 1 open." in page.text


def test_a_report_says_how_to_repeat_it_and_what_is_missing(report, tmp_path):
    _, page = report
    assert f"python -m minitransformer lab toy --data {tmp_path}" in page.text
    for words in ("commit", "torch", "python", "seeds 0–1", "4 of 6", "6.0 minutes", "1 damaged line was skipped"):
        assert words in page.text, words
    assert "incomplete" in page.text
    assert "ValueError: none, at number 5, seed 1" in page.text


def test_every_table_is_a_csv_file_with_all_its_rows_and_digits(report):
    path, page = report
    with (path.parent / "loss-by-depth.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        *(["depth", "loss, mean"], ["2", repr(0.1 + 0.2)], ["4", ""], ["8", "inf"], ["16", 'a "b"']),
    ]
    with (path.parent / "loss-by-depth-2.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 301
    assert "200 of 300 rows; all rows: loss-by-depth-2.csv" in page.text


def test_the_command_in_the_report_is_the_one_that_repeats_it():
    assert lab_command("E1", ExperimentSettings()) == "python -m minitransformer lab E1"
    again = lab_command("E1", ExperimentSettings(quick=True, data="my text.txt"))
    assert again == "python -m minitransformer lab E1 --quick --data 'my text.txt'"


def test_list_shows_every_experiment_with_its_question_and_source_in_80_columns(capsys):
    assert lab.main(["list"]) == 0
    out = capsys.readouterr().out
    flat = re.sub(r"\s+", " ", out)
    for name, experiment in Experiment.registry.items():
        assert re.search(rf"^{name} +\S.* {experiment.minutes:g} min$", out, re.MULTILINE), name
        assert re.sub(r"\s+", " ", experiment.question) in flat
        assert re.sub(r"\s+", " ", experiment.source) in flat
    assert max(map(len, out.splitlines())) <= 80


def test_experiments_come_in_the_order_of_their_numbers(monkeypatch):
    kinds = {name: type(name, (Toy,), {}) for name in ("E10", "E2", "E0")}
    monkeypatch.setattr(Experiment, "registry", kinds)
    assert [kind.__name__ for kind in lab._in_order()] == ["E0", "E2", "E10"]


def test_an_experiment_leaves_its_report_where_it_says(here, capsys):
    assert run("toy", "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "report     lab/toy-quick/report.html"
    assert (here / "lab/toy-quick/report.html").exists()
    assert (here / "lab/toy-quick/squares-of-n.csv").read_text() == 'n,"square, <n²>"\n0,0\n1,1\n'
    assert any(re.match("passed +squares are n²", line) for line in lines)
    assert any(re.match("does not hold +squares are even +1 of 2", line) for line in lines)
    assert any(re.match("open +most squares", line) for line in lines)
    assert max(map(len, lines)) <= 80
    assert run("toy", "--quick") == 0
    assert "2 of 2 tasks were measured before" in capsys.readouterr().out


def test_a_damaged_line_is_measured_again_and_said(here, capsys):
    run("toy", "--quick")
    results = here / "lab/toy-quick/results.jsonl"
    results.write_text(results.read_text().replace('"number": 0', '"number": '))
    capsys.readouterr()
    assert run("toy", "--quick") == 0
    out = capsys.readouterr().out
    assert "1 damaged line was skipped in results.jsonl" in out
    assert "results    2 of 2" in out


def test_a_known_result_that_fails_is_exit_code_1_and_a_claim_on_trial_is_not(here, capsys):
    assert run("toy-wrong", "--quick") == 1
    out = capsys.readouterr().out
    assert "FAILED         squares are odd" in out
    assert (here / "lab/toy-wrong-quick/report.html").exists()


def test_a_task_that_fails_is_exit_code_1_and_the_report_says_so(here, capsys):
    (here / "marks/broken").touch()
    assert run("toy-failing", "--quick", "--out", "out") == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out
    assert "results    1 of 2" in out
    assert "incomplete" in (here / "out/report.html").read_text()
    (here / "marks/broken").unlink()
    assert run("toy-failing", "--quick", "--out", "out") == 0
    assert "incomplete" not in (here / "out/report.html").read_text()


def test_all_goes_on_after_one_that_fails_and_sums_up(here, capsys, only_toys):
    (here / "marks/broken").touch()
    assert run("all", "--quick", "--out", "out") == 1
    printed = capsys.readouterr()
    assert "there are no numbers" in printed.err
    summary = printed.out.strip().splitlines()[-5:]
    assert [line.split() for line in summary] == [
        ["toy", "done", "out/toy/report.html"],
        ["toy-curious", "done", "out/toy-curious/report.html"],
        ["toy-failing", "FAILED", "out/toy-failing/report.html"],
        ["toy-mendable", "FAILED"],
        ["toy-wrong", "FAILED", "out/toy-wrong/report.html"],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toi"], ["'toi'", "'toy'"]),
        (["toy", "--processes", "0"], ["--processes", "0"]),
        (["toy", "--out", "marks"], ["marks", "other contents", "--out"]),
        (["toy-mendable", "--data", "x", "--processes", "1"], ["there are no numbers: bring some"]),
    ],
)
def test_a_mistake_gets_one_sentence(here, capsys, arguments, words):
    (here / "marks/something").touch()
    assert lab.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_what_is_not_installed_is_said_before_anything_is_measured(here, capsys, monkeypatch):
    for module in ("matplotlib.figure", "scipy.stats"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            for experiment in ("toy", "all"):
                assert run(experiment) == 2
                error = capsys.readouterr().err
                assert f"needs {module.partition('.')[0]}" in error
                assert 'pip install -e ".[lab]"' in error
    assert not (here / "lab").exists()


def test_all_says_once_which_experiments_have_no_data_and_runs_the_others(here, capsys, only_toys, monkeypatch):
    for name in ("toy-failing", "toy-mendable", "toy-wrong"):
        monkeypatch.delitem(Experiment.registry, name)
    assert run("toy", "--quick", "--out", "out/toy") == 0
    capsys.readouterr()
    (here / "marks/offline").touch()
    assert run("all", "--quick", "--out", "out") == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    first = printed.out.splitlines()[0]
    assert (
        first == "left out   toy-curious, for lack of data: there is no text: download it; --data FILE takes any text"
    )
    assert [line.split() for line in printed.out.strip().splitlines()[-2:]] == [
        ["toy", "done", "out/toy/report.html"],
        ["toy-curious", "left", "out"],
    ]
    assert (here / "marks/asked").read_text() == "asked\n"
    assert not (here / "out/toy-curious").exists()


def test_an_experiment_without_data_is_one_sentence_before_anything_is_made(here, capsys):
    (here / "marks/offline").touch()
    assert run("toy", "--quick") == 2
    assert capsys.readouterr().err == "error: there is no text: download it\n"
    assert not (here / "lab").exists()
