"""`bench` on the command line: its tables, its files, its pictures, its mistakes, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from minitransformer.benchmark.case import Absent, Case, Contestant, Cost, Work
from minitransformer.benchmark.limits import Limits
from minitransformer.benchmark.report import case_table, picture
from minitransformer.benchmark.rounds import CaseResult, measure
from minitransformer.benchmark.subjects import Subject
from minitransformer.commands import bench
from tests.bench_for_tests import LIMITS, alive, case_of


class Race(Subject, name="race"):
    about = "toy"

    def cases(self):
        entries = [
            Contestant("tortoise", partial(racing, 1.0), base=True),
            Contestant("hare", partial(racing, 2.0)),
            Absent("rabbit", "it has a long reason that is told in a line which has to be folded, as it is so long"),
        ]
        yield Case.of("a race", "laps/s", entries)


Subject.registry.pop("race")


def racing(speed):
    return Work(lambda: speed, Cost(5.0, 0.0))


@pytest.fixture
def race(monkeypatch):
    monkeypatch.setitem(Subject.registry, "race", Race)
    monkeypatch.setattr(bench, "measure_limits", lambda device: LIMITS)


def run(*arguments):
    return bench.main(["--device", "cpu", *map(str, arguments)])


def test_the_command_prints_one_table_of_80_columns_and_writes_every_sample(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 6, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "hare wins: 2 [2–2] times as good as tortoise" in out
    assert re.search(r"^hare +2\.00 \[2\.00–2\.00\] +2 \[2–2\] +10%$", out, re.MULTILINE)
    assert "not measured: rabbit (it has a long reason" in out
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert case["contestants"]["hare"]["samples"] == [2.0] * 6
    assert case["winner"] == "hare"
    assert not case["late"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_contestants_for_which_there_is_no_time_are_left_out_in_the_table_and_in_json(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 6, "--minutes", 1e-9, "--json", tmp_path / "a.json") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured: tortoise, hare (it would exceed --minutes: give more" in out
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert set(case["not_measured"]) == {"tortoise", "hare", "rabbit"}


def test_fewer_rounds_for_want_of_time_are_said():
    result = CaseResult(case_of(a=[1.0], b=[1.0]), "a", {"a": [1.0] * 5, "b": [1.0] * 5}, {"b": [1.0] * 5}, late=True)
    assert "5 rounds: the time limit of this case was reached (--minutes)" in list(case_table(result, None))


def lines_of(figure):
    """Each horizontal line that the picture has."""
    lines = [(line.get_linestyle(), *line.get_data()) for line in figure.axes[0].lines]
    return [(style, list(x)) for style, x, y in lines if style != "None" and len(set(x)) == 2 and len(set(y)) == 1]


@pytest.mark.parametrize(
    ("rounds", "style", "words"), [(6, "-", "95 % interval"), (4, ":", "dotted: from the lowest to the highest")]
)
def test_the_picture_draws_what_its_legend_speaks_of(rounds, style, words):
    samples = {"a": [1.0] * rounds, "b": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0][:rounds]}
    figure = picture([CaseResult(case_of(a=[1.0], b=[2.0]), "a", samples, {"b": samples["a"]})])
    assert lines_of(figure) == [(style, [2.0, samples["b"][-1]])]
    label = figure.axes[0].get_xlabel()
    assert words in label
    assert ("95 %" in label) == (style == "-")


def test_few_rounds_name_no_winner_and_their_json_is_valid(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 2, "--json", tmp_path / "a.json") == 0
    assert "no winner: 2 rounds are too few, at least 6 are needed" in capsys.readouterr().out
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert content["cases"][0]["contestants"]["hare"]["ratio"]["high"] is None


def test_more_than_the_limit_is_said_to_be_no_share_of_it(race, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_limits", lambda device: Limits({"fp32": 8.0}, 1.0))
    assert run("--only", "race", "--rounds", 1) == 0
    assert "above 100 % of the limit" in capsys.readouterr().out


def test_results_come_as_they_are_measured_and_in_a_pipe_the_subjects_are_said(race, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(bench, "measure", lambda *a, **k: (said.append(capsys.readouterr()), measure(*a, **k))[1])
    assert run("--only", "race", "race", "--rounds", 3) == 0
    said.append(capsys.readouterr())
    assert ["limits " in part.out for part in said] == [True, False, False]
    assert ["hare" in part.out for part in said] == [False, True, True]
    assert [part.err for part in said] == ["measuring: limits of the machine\n", "measuring: a race\n", ""]


def test_contestants_are_chosen_by_patterns(race, capsys):
    assert run("--only", "race", "--rounds", 1, "--contestants", "tor*") == 0
    out = capsys.readouterr().out
    assert "there is nothing to compare tortoise with" in out
    assert "hare" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "trianing"], "unknown subject 'trianing': did you mean 'training'?"),
        (["--scaling", "--only", "contxt"], "unknown axis 'contxt': did you mean 'context'?"),
        (["--shape", "nanogpt-gp"], "unknown shape 'nanogpt-gp': did you mean 'nanogpt-gpu'?"),
        (["--against", "/nowhere"], "/nowhere is not a nanoGPT checkout, because it has no model.py"),
        (["--contestants", "our fp32"], "unknown contestant 'our fp32': did you mean 'ours fp32'?"),
        (["--base", "nanogpt"], "unknown contestant 'nanogpt': did you mean 'nanoGPT'?"),
        (["--rounds", "0"], "--rounds is 0: give 1 or more"),
        (["--minutes", "0"], "--minutes is 0.0: it must be above 0"),
        (["--target-loss", "-1"], "--target-loss is -1.0: it must be above 0"),
        (["--json", "/no/such/a.json"], "/no/such/a.json cannot be written, because /no/such does not exist"),
    ],
)
def test_mistakes_are_answered_in_a_sentence_before_anything_is_measured(arguments, sentence, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys; from minitransformer.commands import bench; "
        "assert bench.main(['--device', 'cpu', '--only', 'x']) == 2; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


class Endless(Subject, name="endless"):
    about = "toy"

    def cases(self):
        yield Case.of("a long race", "laps/s", [Contestant("sloth", partial(crawling, self.setting.data))])


Subject.registry.pop("endless")


def crawling(folder):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(folder) / f"{sleeper.pid}").touch()
    (Path(folder) / f"{os.getpid()}").touch()
    return Work(lambda: time.sleep(600))


def run_endless(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    Subject.registry["endless"] = Endless
    bench.measure_limits = lambda device: LIMITS
    return run("--only", "endless", "--data", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(number, tmp_path):
    code = f"import sys; from tests.test_bench_command import run_endless; sys.exit(run_endless({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"interrupted: 0 of 1 cases are measured" in errors
    wait_until(lambda: not any(map(alive, pids)))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
