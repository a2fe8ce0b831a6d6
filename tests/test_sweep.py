"""Hyper-parameter search: what is tried, that pauses and kills leave no trace, and what is said of what came out."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minitransformer.analysis import trials
from minitransformer.analysis.compare import History, compare
from minitransformer.analysis.search_space import Range, Values, draws, grid, rungs
from minitransformer.analysis.sweep import Standing, SweepFolder, standings_ranking
from minitransformer.analysis.sweep_plan import SweepPlan, configured, flags
from minitransformer.analysis.trials import train_trial
from minitransformer.commands import sweep as command
from minitransformer.commands import train as train_command_module
from minitransformer.errors import UserError
from minitransformer.runs import Run
from minitransformer.tasks import pool
from minitransformer.training.config import RunConfig
from minitransformer.training.machine import COMPILE_PAYS_AFTER_FLOPS, Resolved
from minitransformer.training.presets import PRESETS
from tests.runs_for_tests import TEXT as LONG_TEXT
from tests.runs_for_tests import TINY
from tests.runs_for_tests import configured as tiny

pytestmark = pytest.mark.unchecked_shapes

ROOT = Path(__file__).parent.parent
SHAPE = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--tokenizer", "bytes"]
SMALL = [
    *SHAPE,
    "--batch-size",
    "2",
    "--warmup-steps",
    "2",
    "--compile",
    "off",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]
TEXT = LONG_TEXT[:2400]
LR, RESIDUAL = Values("lr", (1e-3, 3e-3)), Values("residual", ("pre", "post"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    monkeypatch.setenv("COLUMNS", "80")
    trials._prepared.cache_clear()
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Trials run here, one after the other, and leave a note; real processes take seconds to start."""
    began = []

    def outcomes(tasks, measure, processes):
        for task in tasks:
            began.append(task)
            yield pool._outcome(measure, task)

    monkeypatch.setattr(pool, "outcomes", outcomes)
    return began


def sweep(*arguments, steps=6):
    return command.main(["gpt-nano", *arguments, "--data", "my.txt", "--steps", str(steps), *SMALL])


def refused(capsys, *arguments):
    """The one sentence that a mistake gets."""
    assert command.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def results(folder):
    """What was measured, each thing once."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in records}) == len(records)
    return records


def weights(run):
    return load_file(run / "checkpoints/latest/model.safetensors")


def assert_same_run(left, right):
    """The same weights, the same validations, the same best checkpoint."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    validations = [
        [line for line in (run / "metrics.jsonl").read_text().splitlines() if "validation_loss" in line]
        for run in (left, right)
    ]
    assert validations[0] == validations[1]
    best = [(run / "checkpoints/best").resolve().name for run in (left, right)]
    assert best[0] == best[1]


def test_a_grid_is_every_combination_once_the_last_setting_fastest():
    assert grid([LR, RESIDUAL]) == [
        {"lr": 1e-3, "residual": "pre"},
        {"lr": 1e-3, "residual": "post"},
        {"lr": 3e-3, "residual": "pre"},
        {"lr": 3e-3, "residual": "post"},
    ]


SPACE = [Range("lr", 1e-4, 1e-1), Range("num_layers", 2, 8), Range("dropout", 0.0, 0.3), RESIDUAL]


@given(count=st.integers(1, 30), seed=st.integers(0, 999))
def test_random_draws_are_different_within_their_ranges_and_repeat_with_their_seed(count, seed):
    drawn = draws(SPACE, count, seed)
    assert drawn == draws(SPACE, count + 5, seed)[:count]
    assert len({tuple(one.values()) for one in drawn}) == count
    for one in drawn:
        assert 1e-4 <= one["lr"] <= 1e-1
        assert type(one["num_layers"]) is int
        assert 2 <= one["num_layers"] <= 8
        assert 0 <= one["dropout"] <= 0.3
        assert one["residual"] in ("pre", "post")


def test_draws_are_even_in_the_logarithm_over_wide_ranges_only():
    wide = [one["lr"] for one in draws([Range("lr", 1e-4, 1e-2)], 400, 0)]
    assert sum(lr < 1e-3 for lr in wide) == pytest.approx(200, abs=40)
    narrow = [one["lr"] for one in draws([Range("lr", 1e-3, 5e-3)], 200, 0)]
    assert sum(lr < 3e-3 for lr in narrow) == pytest.approx(100, abs=30)
    assert draws([Range("lr", 1e-4, 1e-2)], 5, 0) != draws([Range("lr", 1e-4, 1e-2)], 5, 1)


@given(steps=st.integers(1, 5000), count=st.integers(1, 100), factor=st.integers(2, 5), every=st.integers(1, 500))
def test_rungs_grow_by_the_factor_to_all_steps_and_fall_on_validations(steps, count, factor, every):
    try:
        found = rungs(steps, count, factor, every)
    except UserError:
        assert count < factor or steps < count
        return
    assert found[-1] == steps
    assert found == sorted(set(found))
    assert all(later == factor * earlier for earlier, later in pairwise(found[:-1]))
    assert all(rung % min(found[0], every) == 0 for rung in found[:-1])
    assert factor ** (len(found) - 1) <= count < factor ** len(found)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_trial_that_pauses_at_rungs_equals_a_run_that_never_paused_bit_for_bit(here, schedule):
    config = tiny(data=str(here / "my.txt"), schedule=schedule, steps=10, eval_every=2, dropout=0.1, device="cpu")
    for until in (2, 6, 10):
        paused = train_trial(here / "paused", config, until)
        assert paused["steps"] == until
    train_trial(here / "whole", config, 10)
    assert_same_run(here / "paused", here / "whole")


def test_a_measurement_of_a_rung_does_not_change_when_the_trial_has_gone_on(here):
    config = tiny(data=str(here / "my.txt"), eval_every=2, device="cpu")
    early = train_trial(here / "run", config, 4)
    train_trial(here / "run", config, 12)
    before = (here / "run/metrics.jsonl").read_text()
    assert train_trial(here / "run", config, 4) == early
    assert (here / "run/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", ["config.json", "checkpoints/latest/model.safetensors"])
def test_a_damaged_trial_is_trained_anew_to_the_same_end(here, damage):
    config = tiny(data=str(here / "my.txt"), eval_every=2, device="cpu", steps=6)
    first = train_trial(here / "run", config, 4)
    (here / "run" / damage).write_bytes(b"{")
    assert train_trial(here / "run", config, 4) == first


def test_halving_lets_the_best_third_go_on_and_resumes_it(here, in_process, capsys):
    rates = [f"{rate:g}" for rate in (1e-6, 1e-2, 1e-5, 2e-2, 1e-4, 5e-3, 1e-3, 2e-3, 3e-3)]
    arguments = ["--set", f"lr={','.join(rates)}", "--halving", "3", "--out", "s"]
    assert sweep(*arguments, steps=18) == 0
    out = capsys.readouterr().out
    by_rung = {until: [r for r in results(here / "s") if r["task"]["until"] == until] for until in (2, 6, 18)}
    assert [len(found) for found in by_rung.values()] == [9, 3, 1]
    for until, following in ((2, 6), (6, 18)):
        losses = {record["task"]["lr"]: record["measured"]["validation_loss"] for record in by_rung[until]}
        best = sorted(losses, key=losses.__getitem__)[: len(losses) // 3]
        assert {record["task"]["lr"] for record in by_rung[following]} == set(best)
    # What goes on is resumed: its folder equals that of train.py with the command that is printed.
    [line] = [line for line in out.splitlines() if line.startswith("repeat")]
    words = shlex.split(line)[3:]
    torch.set_num_threads(1)
    assert train_command_module.main([*words, "--out", "again"]) == 0
    [run] = [line.split()[1] for line in out.splitlines() if line.startswith("run  ")]
    assert_same_run(here / run, here / "again")
    assert Run.open(here / run).config == Run.open(here / "again").config


def test_the_command_that_repeats_a_trial_says_all_that_differs_from_the_preset():
    config = configured(
        PRESETS["gpt-nano"],
        {
            "lr": 1e-3,
            "tied_embeddings": True,
            "bias": True,
            "patience": 3,
            "window_pattern": (True, False),
            "norm_bias": False,
        },
    )
    for changed in (config, replace(config, model=replace(config.model, d_ff=None, tied_embeddings=False))):
        options = train_command_module._parse(flags(PRESETS["gpt-nano"], changed), PRESETS["gpt-nano"])
        assert options.config == changed


def test_a_sweep_leaves_runs_a_table_and_a_page_and_does_nothing_twice(here, in_process, capsys):
    arguments = ["--set", "lr=1e-3,1e-1", "--set", "residual=pre,post", "--seeds", "0,1", "--out", "s"]
    assert sweep(*arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, (line for line in out.splitlines() if not line.startswith("repeat")))) <= 80
    assert len(in_process) == 8
    assert len(list((here / "s/trials").glob("*/config.json"))) == 8
    with (here / "s/trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["residual"], row["seed"]) for row in rows[:3]] == [
        *(("0.001", "pre", "0"), ("0.001", "pre", "1"), ("0.001", "post", "0"))
    ]
    means = {}
    for row in rows:
        means.setdefault((row["lr"], row["residual"]), []).append(float(row["validation_loss"]))
        assert Run.open(here / "s" / row["run"]).config.training.lr == float(row["lr"])
    order = sorted(means, key=lambda name: sum(means[name]))
    table = [line.split()[:2] for line in out.split("----\n")[1].splitlines()[:4]]
    assert table == [[f"{float(rate):g}", place] for rate, place in order]
    page = (here / "s/report.html").read_text()
    assert page.count("<img") == 2
    assert "python train.py gpt-nano" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    links = re.findall(r'href="([^"]*)"', page)
    assert {"trials.csv", *(f"{row['run']}/" for row in rows)} == set(links)
    assert all((here / "s" / link).exists() for link in links)

    assert sweep(*arguments) == 0
    assert len(in_process) == 8


def test_a_damaged_line_is_skipped_counted_said_and_measured_again(here, in_process, capsys):
    arguments = ["--set", "lr=1e-3,1e-1", "--out", "s"]
    assert sweep(*arguments) == 0
    first, second = results(here / "s")
    file = here / "s/results.jsonl"
    file.write_text(json.dumps(first) + "\n" + json.dumps(second)[:40])
    capsys.readouterr()
    assert sweep(*arguments) == 0
    assert "1 damaged line was skipped" in capsys.readouterr().out
    assert len(in_process) == 3
    assert json.loads(file.read_text().splitlines()[-1])["measured"] == second["measured"]


def test_seeds_and_values_may_be_added_to_a_sweep(here, in_process):
    assert sweep("--set", "lr=1e-3,1e-1", "--out", "s", steps=2) == 0
    assert sweep("--set", "lr=1e-3,1e-1,1e-2", "--seeds", "0..1", "--out", "s", steps=2) == 0
    assert [(task["lr"], task["seed"]) for task in in_process[2:]] == [(1e-3, 1), (1e-1, 1), (1e-2, 0), (1e-2, 1)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--set", "residual=pre,post"], ["settings lr", "residual"]),
        (["--set", "lr=1e-3,1e-1", "--dropout", "0.1"], ["dropout 0.0", "0.1"]),
        (["--set", "lr=1e-3,1e-1,1", "--halving", "2"], ["halving None", "2"]),
    ],
)
def test_the_folder_of_another_sweep_is_refused(here, in_process, capsys, changed, words):
    assert sweep("--set", "lr=1e-3,1e-1", "--out", "s", steps=2) == 0
    before = (here / "s/results.jsonl").read_text()
    error = refused(capsys, "gpt-nano", *changed, "--out", "s", "--data", "my.txt", "--steps", "2", *SMALL)
    for word in [*words, "--out"]:
        assert word in error
    assert (here / "s/results.jsonl").read_text() == before


def test_a_halving_with_other_values_is_another_sweep():
    identities = [
        SweepPlan("gpt-nano", TINY, (Values("lr", rates),), halving=2).identity for rates in ((0.1, 0.2), (0.1, 0.3))
    ]
    assert identities[0] != identities[1]


def test_another_text_under_the_same_name_is_refused(here, in_process, capsys):
    arguments = ["--set", "lr=1e-3,1e-1", "--out", "s"]
    assert sweep(*arguments, steps=2) == 0
    (here / "my.txt").write_text(TEXT.upper())
    trials._prepared.cache_clear()  # as in a process that has just started
    assert "not the text" in refused(capsys, "gpt-nano", *arguments, "--data", "my.txt", "--steps", "2", *SMALL)


def test_trials_that_are_not_finite_rank_last_and_are_said(here, in_process, capsys):
    assert sweep("--set", "lr=1e-3,1e30,3e-3", "--optimizer", "adamw", "--out", "s", "--log-every", "1", steps=30) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[next(i for i, line in enumerate(lines) if line.startswith("---")) + 3].split()[0] == "1e+30"
    assert "not finite (seed 0)" in out
    assert "Infinite or NaN losses, which rank last: lr 1e+30 (seed 0)" in " ".join(out.split())


def test_a_trial_that_fails_is_said_ranks_last_and_is_tried_again(here, in_process, capsys, monkeypatch):
    real = train_trial

    def failing(path, config, until, machine):
        if config.training.lr == 1e-3:
            raise ZeroDivisionError("no inverse")
        return real(path, config, until, machine)

    monkeypatch.setattr("minitransformer.analysis.sweep.train_trial", failing)
    arguments = ["--set", "lr=1e-3,1e-1", "--out", "s"]
    assert sweep(*arguments, steps=2) == 1
    out = capsys.readouterr().out
    assert "no inverse" in out
    assert "not measured (seed 0)" in out
    monkeypatch.undo()


SURE = Standing({"lr": 1}, 10, (1.0, 1.1, 1.2, 1.1, 1.0), (), ())
CLOSE = Standing({"lr": 2}, 10, (1.05, 1.2, 1.1, 1.1, 1.0), (), ())
FAR = Standing({"lr": 3}, 10, (2.01, 2.1, 2.22, 2.1, 2.0), (), ())


def test_a_winner_is_named_only_where_the_seeds_bear_it_out():
    assert str(standings_ranking([SURE, FAR])).startswith("lr 1 is best")
    assert str(standings_ranking([SURE, CLOSE, FAR])) == "No winner: at 95 %, the seeds do not tell lr 1 from lr 2."
    for seeds in (1, 2, 4):
        few = [replace(standing, values=standing.values[:seeds]) for standing in (SURE, FAR)]
        assert "fewer than the 5" in str(standings_ranking(few))


def test_the_smallest_difference_worth_naming_is_a_flag_and_changes_no_trial(here, in_process, capsys):
    arguments = ["--set", "lr=1e-3,1e-1", "--seeds", "0..4", "--out", "s"]
    assert sweep(*arguments) == 0
    assert "is best: " in " ".join(capsys.readouterr().out.split())
    assert sweep(*arguments, "--smallest-difference", "9") == 0
    assert "by less than 9." in " ".join(capsys.readouterr().out.split())
    assert len(in_process) == 10


def test_a_sweep_and_a_comparison_of_its_trials_show_the_same_paired_differences_and_say_the_same(
    here, in_process, capsys
):
    assert sweep("--set", "lr=1e-3,2.5", "--seeds", "0..4", "--eval-every", "2", "--out", "s") == 0
    out = " ".join(capsys.readouterr().out.split())
    compared = compare(sorted((here / "s/trials").iterdir()))
    ((_, difference, seeds, p),) = compared.pairs().rows
    assert seeds == 5
    assert f"lr 0.001 − lr 2.5 {difference} 5 {p}" in out
    verdict = compared.verdict.partition(". ")[2]
    assert verdict in out
    page = (here / "s/report.html").read_text()
    assert f">{difference}</td>" in page


def test_a_trial_is_judged_by_its_last_validation_as_compare_judges_a_run(here):
    config = tiny(data=str(here / "my.txt"), eval_every=2, device="cpu", steps=6)
    train_trial(here / "run", config, 6)
    file = here / "run/metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    losses = iter((3.0, 1.0, 2.0))
    changed = [
        {**record, "validation_loss": next(losses)} if "validation_loss" in record else record for record in records
    ]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in changed))
    measured = trials._outcome(here / "run", 6, finite=True)
    assert measured["validation_loss"] == History.open(here / "run").last("validation_loss") == 2
    assert (measured["best_validation_loss"], measured["best_step"]) == (1, 4)


def test_a_sweep_that_was_judged_by_best_validations_is_not_mixed_with_last_ones(here, in_process, capsys):
    assert sweep("--set", "lr=1e-3,1e-1", "--out", "s", steps=2) == 0
    record = json.loads((here / "s/sweep.json").read_text())
    del record["identity"]["judged by"]
    (here / "s/sweep.json").write_text(json.dumps(record))
    error = refused(
        capsys, "gpt-nano", "--set", "lr=1e-3,1e-1", "--out", "s", "--data", "my.txt", "--steps", "2", *SMALL
    )
    assert "judged by None, not the last validation" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to sweep", "--set"]),
        (["--set", "learning_rate=1"], ["learning_rate", "--help"]),
        (["--set", "residal=pre,post"], ["residal", "'residual'"]),
        (["--set", "lr"], ["lr", "no values"]),
        (["--set", "lr=-1,1e-3"], ["lr is -1.0: it must be above 0", "lr -1"]),
        (["--set", "residual=pots,pre"], ["unknown residual placement 'pots': did you mean 'post'?"]),
        (["--set", "tied_embeddings=yes,no"], ["tied_embeddings", "true"]),
        (["--set", "d_model=16,20", "--set", "num_heads=2,8"], ["d_model 20", "num_heads 8", "in the combination"]),
        (["--set", "lr=1e-4..1e-2"], ["lr is a range", "--random"]),
        (["--set", "lr=1e-2..1e-4", "--random", "3"], ["empty"]),
        (["--set", "residual=a..b", "--random", "3"], ["no number"]),
        (["--set", "residual=pre,post", "--random", "3"], ["--random 3", "2 different"]),
        (["--set", "lr=1e-4..1e-2", "--random", "0"], ["--random is 0"]),
        (["--set", "lr=1,2", "--set", "lr=3"], ["lr", "2 times"]),
        (["--set", "seed=1,2"], ["--seeds"]),
        (["--set", "lr=1,2", "--seeds", "0,0"], ["--seeds", "different"]),
        (["--set", "lr=1,2", "--seeds", "a"], ["--seeds a"]),
        (["--set", "data=a.txt,b.txt"], ["data", "compare"]),
        (["--set", "tokenizer=bytes,chars", "--metric", "validation_loss"], ["tokenizer", "bits_per_byte"]),
        (["--set", "window_pattern=True,False"], ["window_pattern", "flag"]),
        (["--set", "lr=1,2", "--halving", "3"], ["--halving 3", "2"]),
        (["--set", "lr=1,2", "--halving", "1"], ["--halving is 1"]),
        (["--set", "lr=1,2,3,4,5,6,7,8,9", "--halving", "3"], ["6 steps", "--steps"]),
        (["--set", "steps=6,8", "--halving", "2"], ["steps", "--halving"]),
        (["--set", "lr=1,2", "--processes", "0"], ["--processes is 0"]),
        (["--set", "lr=1,2", "--smallest-difference", "-1"], ["--smallest-difference is -1"]),
        (["--set", "lr=1,2", "--device", "abacus"], ["abacus", "cpu"]),
        (["--set", "lr=1,2", "--out", "my.txt"], ["my.txt", "file"]),
        (["--set", "lr=1,2", "--out", "."], ["other things", "--out"]),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(here, in_process, capsys, arguments, words):
    error = refused(capsys, "gpt-nano", "--data", "my.txt", "--steps", "6", *SMALL, *arguments)
    for word in words:
        assert word in error
    assert not in_process
    assert not (here / "sweeps").exists()


@pytest.mark.parametrize("value", ["lr=abc", "compile=maybe", "num_layers=2.5"])
def test_a_value_that_does_not_parse_is_answered_as_train_answers_it(here, capsys, value):
    name, _, word = value.partition("=")
    said = []
    for main, arguments in (
        (command.main, ["--set", value]),
        (train_command_module.main, [f"--{name.replace('_', '-')}", word]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        said.append(" ".join(capsys.readouterr().err.replace("│", " ").split()).partition("──")[0])
    assert word in said[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tied_embeddings=true,False", (True, False)),
        ("norm-bias=none,true", (None, True)),
        ("d_ff=None,32", (None, 32)),
        ("lr=1,3e-4", (1.0, 3e-4)),
        ("residual=pre, post,pre", ("pre", "post")),
        ("compile=on,off", ("on", "off")),
    ],
)
def test_values_are_read_as_train_reads_them(text, values):
    read = command._setting(text).values
    assert read == values
    assert list(map(type, read)) == list(map(type, values))


def test_tokens_that_differ_are_compared_by_bits_per_byte(here, in_process, capsys):
    assert sweep("--set", "tokenizer=bytes,chars", "--out", "s", steps=2) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_a_metric_that_the_objective_does_not_have_is_refused(here, capsys):
    arguments = ["--set", "lr=1,2", "--metric", "bits_per_byte", "--data", "my.txt", *SMALL]
    assert "validation_loss" in refused(capsys, "bert-mini", *arguments)


@pytest.mark.parametrize("module", ["matplotlib.figure", "scipy.stats"])
def test_what_is_not_installed_is_said_before_anything_is_trained(here, in_process, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["gpt-nano", "--set", "lr=1e-3,1e-2", "--data", "my.txt", *SMALL]
    assert f"sweeps need {module.partition('.')[0]}" in refused(capsys, *arguments)
    assert not in_process
    assert not (here / "sweeps").exists()


def test_a_sweep_with_tensorboard_is_refused_where_it_is_not_installed(here, in_process, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["gpt-nano", "--set", "lr=1e-3,1e-2", "--data", "my.txt", *SMALL, "--tensorboard"]
    assert "--tensorboard needs" in refused(capsys, *arguments)
    assert not in_process


def has_units(monkeypatch, there):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)


def auto_plan(*settings, **training):
    base = tiny(TINY, data="my.txt", precision="auto", device="cpu", steps=2, **training)
    return SweepPlan("tiny", base, settings or (LR,), seeds=(0, 1))


def test_all_trials_of_a_sweep_have_the_machine_that_it_began_with(here, in_process, monkeypatch):
    has_units(monkeypatch, False)
    began = SweepFolder(here / "sweep", auto_plan())
    began.plan.prepare()
    assert began.run() == []
    has_units(monkeypatch, True)
    more = SweepFolder(here / "sweep", replace(auto_plan(), seeds=(0, 1, 2)))
    assert more.run() == []
    machines = {Run.open(path).machine for path in (here / "sweep/trials").iterdir()}
    assert machines == {Resolved("cpu", "fp32", False)}
    assert json.loads((here / "sweep/sweep.json").read_text())["machine"]["precision"] == "fp32"


def test_a_sweep_does_not_go_on_where_its_trials_would_be_computed_otherwise(here, in_process, monkeypatch):
    has_units(monkeypatch, True)
    began = SweepFolder(here / "sweep", auto_plan())
    began.plan.prepare()
    assert began.run() == []
    has_units(monkeypatch, False)
    more = SweepFolder(here / "sweep", replace(auto_plan(), seeds=(0, 1, 2)))
    with pytest.raises(UserError, match=r"precision bf16 -> fp32 \(this machine has no bf16 units\)"):
        more.run()


def test_a_precision_that_is_swept_is_that_of_the_trial(here, in_process, monkeypatch):
    has_units(monkeypatch, False)
    search = SweepFolder(here / "sweep", auto_plan(Values("precision", ("auto", "bf16"))))
    search.plan.prepare()
    assert search.run() == []
    machines = {path.name: Run.open(path).machine.precision for path in (here / "sweep/trials").iterdir()}
    assert machines["precision-bf16-seed-0"] == "bf16"
    assert machines["precision-auto-seed-0"] == "fp32"


def test_trials_are_compiled_only_where_that_pays_for_the_shortest(here, monkeypatch):
    has_units(monkeypatch, True)
    monkeypatch.setattr("minitransformer.training.machine.find_compiler", lambda: "g++")
    long, short = auto_plan(Values("steps", (200, 400))), auto_plan(Values("steps", (1, 400)))
    of_a_step = trials.run_flops(short.config({"steps": 1}, seed=0))
    monkeypatch.setitem(COMPILE_PAYS_AFTER_FLOPS, "cpu", 1.5 * of_a_step)
    assert SweepFolder(here / "long", long).machine.compile
    assert not SweepFolder(here / "short", short).machine.compile


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was_and_does_nothing_twice(here, capsys, in_process):
    arguments = ["--set", "lr=1e-3,1e-2", "--save-every", "20", "--eval-every", "50", "--out", "s"]
    words = ["gpt-nano", *arguments, "--data", "my.txt", "--steps", "120", *SMALL]
    line = [sys.executable, "-m", "minitransformer", "sweep", *words, "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    end = time.monotonic() + 300
    while not list((here / "s/trials").glob("*/checkpoints/step-000040")):
        assert child.poll() is None, child.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = len(results(here / "s")) if (here / "s/results.jsonl").exists() else 0
    assert finished < 2
    out = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    records = results(here / "s")
    assert len(records) == len({record["key"] for record in records}) == 2
    assert sweep(*arguments[:-1], "whole", steps=120) == 0
    for path in (here / "s/trials").iterdir():
        assert_same_run(path, here / "whole/trials" / path.name)
        assert not list(path.rglob("*.partial"))


def test_a_search_measures_what_a_plan_asks_for(here, in_process):
    base = tiny(data=str(here / "my.txt"), steps=4, device="cpu")
    plan = SweepPlan("gpt-nano", base, (LR, RESIDUAL), seeds=(3,))
    plan.prepare()
    search = SweepFolder(here / "s", plan)
    assert search.run() == []
    assert [(s.until, len(s.values)) for s in search.standings(1)] == [(4, 1)] * 4
    assert search.results()[0].task == {"lr": 1e-3, "residual": "pre", "seed": 3, "until": 4}
    assert isinstance(plan.config(plan.combinations[0], 3), RunConfig)
