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

import pytest
import torch

from minitransformer.analysis import trials
from minitransformer.analysis.compare import History, compare
from minitransformer.analysis.search_space import Values
from minitransformer.analysis.sweep import Standing, SweepFolder, standings_ranking
from minitransformer.analysis.sweep_plan import SweepPlan, configured, flags
from minitransformer.analysis.trials import train_trial
from minitransformer.commands import train as train_command_module
from minitransformer.errors import UserError
from minitransformer.runs import Run
from minitransformer.training.config import RunConfig
from minitransformer.training.machine import COMPILE_PAYS_AFTER_FLOPS, Resolved
from minitransformer.training.presets import PRESETS
from minitransformer.training.ranks import ONE_PROCESS
from tests.runs_for_tests import TINY
from tests.runs_for_tests import configured as tiny
from tests.sweeping_for_tests import (
    LR,
    RESIDUAL,
    ROOT,
    SMALL,
    TEXT,
    assert_same_run,
    refused,
    results,
    sweep,
)

pytestmark = [pytest.mark.unchecked_shapes, pytest.mark.usefixtures("short_text")]


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
            "attention_window": 16,
            "window_pattern": (True, False),
            "norm_bias": False,
        },
    )
    for changed in (config, replace(config, model=replace(config.model, d_ff=None, tied_embeddings=False))):
        _, config = train_command_module._parse(flags(PRESETS["gpt-nano"], changed), PRESETS["gpt-nano"], ONE_PROCESS)
        assert config == changed


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

    def failing(path, config, until, machine, metrics):
        if config.training.lr == 1e-3:
            raise ZeroDivisionError("no inverse")
        return real(path, config, until, machine, metrics=metrics)

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
    assert str(standings_ranking([SURE, FAR], smallest=0.002)).startswith("lr 1 is best")
    unclear = standings_ranking([SURE, CLOSE, FAR], smallest=0.002)
    assert str(unclear) == "No winner: at 95 %, lr 1 and lr 2 do not differ significantly."
    for seeds in (1, 2, 4):
        few = [replace(standing, values=standing.values[:seeds]) for standing in (SURE, FAR)]
        assert "fewer than the 5" in str(standings_ranking(few, smallest=0.002))


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
