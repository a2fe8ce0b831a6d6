"""A sweep: every task is measured once, whatever interrupts it, and its folder stays what it is."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.lab.experiment import ExperimentSettings
from minitransformer.lab.runner import ExperimentFolder
from minitransformer.processes import Process
from minitransformer.tasks import pool
from minitransformer.tasks.progress import TaskProgress
from minitransformer.tasks.runner import run_tasks
from minitransformer.tasks.store import ResultStore
from minitransformer.tasks.task import task_key
from tests.lab_for_tests import CuriousToy, FailingToy, MendableToy, Toy, WrongToy, doubled, sleeps_beside_a_child

ROOT = Path(__file__).parent.parent
TASKS = [{"number": n} for n in range(4)]
json_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "toy"


def times_done(marks):
    """How often each task was done."""
    return {path.name: len(path.read_text().splitlines()) for path in marks.glob("task-*")}


def ended(pid):
    """Whether the process `pid` is gone, or will be as soon as its parent looks."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def folder_of(marks, folder, kind=Toy, **settings):
    return ExperimentFolder(folder, kind(ExperimentSettings(data=str(marks), **settings)))


# -- the store


@given(st.dictionaries(st.text(), json_values))
def test_a_task_is_known_by_its_choices_in_any_order(task):
    assert task_key(task) == task_key(dict(reversed(task.items())))
    assert task_key(task) == task_key(json.loads(json.dumps(task)))


def test_results_are_read_back_as_they_were_kept(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    measured = {"loss": 0.1 + 0.2, "curve": [1, 2.5, None], "name": "é\n"}
    store.add(TASKS[1], measured, 1.5)
    store.add(TASKS[0], {"loss": float("inf")}, 0.5)
    again = ResultStore(tmp_path / "results.jsonl")
    assert [result.task for result in again.results(TASKS)] == TASKS[:2]
    assert again.results(TASKS)[1].measured == measured
    assert again.seconds[task_key(TASKS[1])] == 1.5
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert list(record) == ["key", "task", "measured", "seconds"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"",
        lambda line: b"\x00" * len(line),
        lambda line: b"\xff" + line,
        lambda line: b"[1, 2]",
        lambda line: line.replace(b'"number": 1', b'"number": 3'),
        lambda line: line.replace(b'"measured": {"square": 1}', b'"measured": 1'),
    ],
)
@pytest.mark.parametrize("which", [1, 2])
def test_a_damaged_line_costs_that_result_and_no_other(tmp_path, damage, which):
    path = tmp_path / "results.jsonl"
    store = ResultStore(path)
    for n in (0, 1, 2) if which == 1 else (0, 2, 1):
        store.add({"number": n}, {"square": n * n}, 1.0)
    lines = path.read_bytes().splitlines()
    lines[which] = damage(lines[which])
    path.write_bytes(b"\n".join(lines) + (b"\n" if which == 1 else b""))  # the last one without its end
    damaged = ResultStore(path)
    assert damaged.skipped == (1 if lines[which] else 0)
    assert [result.task["number"] for result in damaged.results(TASKS)] == [0, 2]
    damaged.add({"number": 1}, {"square": 1}, 1.0)
    assert len(ResultStore(path).results(TASKS)) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    store.path = Path("/dev/full")
    with pytest.raises(UserError, match="no space left"):
        store.add(TASKS[0], {}, 1.0)


# -- the processes


def test_a_function_is_measured_in_another_process_with_one_thread(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    before = dict(os.environ)
    assert run_tasks([*TASKS, *TASKS], partial(doubled, factor=10), store, processes=1) == []
    measured = [result.measured for result in store.results(TASKS)]
    assert [m["doubled"] for m in measured] == [0, 10, 20, 30]
    assert {m["torch_threads"] for m in measured} == {1}
    assert os.getpid() not in {m["process"] for m in measured}
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(TASKS)
    assert dict(os.environ) == before


def test_nothing_to_measure_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_Worker", None)
    store = ResultStore(tmp_path / "results.jsonl")
    store.add(TASKS[0], {}, 1.0)
    assert run_tasks(TASKS[:1], doubled, store) == []
    assert run_tasks([], doubled, store) == []


def test_a_task_that_fails_is_reported_and_tried_again_and_the_others_go_on(marks, folder):
    (marks / "broken").touch()
    heard = []
    progress = type("Heard", (TaskProgress,), {"failed": lambda self, failure: heard.append(failure)})()
    failures = folder_of(marks, folder, FailingToy).run(2, progress)
    assert heard == failures
    assert {failure.task["number"] for failure in failures} == {1, 2}
    words = " ".join(str(failure) for failure in failures)
    assert "ZeroDivisionError: no inverse (lab_for_tests.py, line" in words
    assert "was killed, as happens when memory runs out" in words
    assert "number 1, seed 1" in words
    assert "\n" not in words
    assert set(times_done(marks)) == {"task-0", "task-3", "task-4", "task-5"}
    (marks / "broken").unlink()
    assert folder_of(marks, folder, FailingToy).run(2) == []
    assert times_done(marks) == {f"task-{n}": 1 for n in range(6)}


def test_a_mistake_of_the_user_stops_the_sweep_with_its_sentence(marks, folder):
    with pytest.raises(UserError, match=r"^there are no numbers: bring some$"):
        folder_of(marks, folder, MendableToy).run(2)


def test_a_function_that_no_other_process_can_find_is_an_error_at_once(tmp_path):
    with pytest.raises((AttributeError, TypeError), match=r"lambda|local"):
        run_tasks(TASKS, lambda task: {}, ResultStore(tmp_path / "results.jsonl"), processes=1)


def test_closing_the_outcomes_ends_the_processes_and_those_that_they_started(tmp_path):
    outcomes = pool.outcomes([{"file": str(tmp_path / "pids")}] * 2, sleeps_beside_a_child, 1)
    outcome = next(outcomes)
    outcomes.close()
    wait_for(lambda: all(ended(pid) for pid in outcome.measured["pids"]))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_when_all_is_measured_no_process_is_left_of_those_that_tasks_started(tmp_path):
    (outcome,) = pool.outcomes([{"file": str(tmp_path / "pids")}], sleeps_beside_a_child, 1)
    wait_for(lambda: all(ended(pid) for pid in outcome.measured["pids"]))


def test_an_interruption_while_a_process_starts_is_heard_afterwards(monkeypatch):
    start = SpawnProcess.start
    monkeypatch.setattr(SpawnProcess, "start", lambda process: (signal.raise_signal(signal.SIGINT), start(process)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Process(exit)
    finally:
        signal.signal(signal.SIGINT, before)


# -- the folder


def test_a_second_run_measures_nothing_and_says_the_same(marks, folder):
    first = folder_of(marks, folder)
    first.run(2)
    again = folder_of(marks, folder)
    again.run(2)
    assert times_done(marks) == {f"task-{n}": 1 for n in range(6)}
    assert [table.rows for table in again.conclude().tables] == [table.rows for table in first.conclude().tables]
    assert len(again.records) == 1
    assert again.records[0]["commit"]


def test_results_ask_for_more_and_a_sweep_that_was_stopped_asks_for_the_same(marks, folder):
    run = folder_of(marks, folder, CuriousToy)
    assert [task["number"] for task in run.asked()] == [0, 2]
    assert run.run(2) == []
    assert [row[0] for row in run.conclude().tables[0].rows] == [0, 2, 4]
    lines = run.store.path.read_text().splitlines(keepends=True)
    run.store.path.write_text("".join(lines[1:]))
    folder_of(marks, folder, CuriousToy).run(2)
    assert sorted(times_done(marks).values()) == [1, 1, 2]


def test_results_that_are_not_asked_for_are_ignored(marks, folder):
    run = folder_of(marks, folder, quick=True)
    run.store.path.parent.mkdir()
    for n in (5, 1, 0):
        run.store.add({"number": n, "seed": n % 2}, {"square": n * n}, 1.0)
    assert [row[0] for row in run.conclude().tables[0].rows] == [0, 1]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [(WrongToy, {}, ["toy", "toy-wrong"]), (Toy, {"quick": True}, ["quick"]), (Toy, {"data": "x"}, ["data", "x"])],
)
def test_a_folder_of_another_sweep_is_refused(marks, folder, kind, settings, words):
    folder_of(marks, folder).run(1)
    with pytest.raises(UserError) as error:
        ExperimentFolder(folder, kind(ExperimentSettings(**{"data": str(marks), **settings})))
    for word in [*words, str(folder), "--out"]:
        assert word in str(error.value)


def test_a_folder_with_other_things_and_a_damaged_one_are_refused(marks, folder):
    with pytest.raises(UserError, match="has other contents"):
        ExperimentFolder(ROOT, Toy(ExperimentSettings()))
    with pytest.raises(UserError, match="is a file"):
        ExperimentFolder(Path(__file__), Toy(ExperimentSettings()))
    folder.mkdir()
    (folder / "results.jsonl.lock").touch()
    (folder / ".experiment.json-abc.partial").touch()  # as a killed command leaves it
    folder_of(marks, folder)
    for text in ("{", "[]", "{}", '{"experiment": "toy", "settings": {"fast": 1}, "provenance": []}'):
        (folder / "experiment.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            folder_of(marks, folder)


# -- interruptions


def started(marks, folder):
    """`lab toy` as a process of its own, as soon as three tasks are done and the others are in work."""
    (marks / "hold").touch()
    code = (
        "import sys, tests.lab_for_tests; from minitransformer.commands.lab import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "toy", "--data", str(marks), "--out", str(folder), "--processes", "2"],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    results = folder / "results.jsonl"
    wait_for(lambda: results.exists() and results.read_text().count("\n") == 3)
    wait_for(lambda: len(list(marks.glob("began-*"))) == 2)
    return process


def workers(marks):
    return [int(path.name.partition("-")[2]) for path in marks.glob("began-*")]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_killed_goes_on_where_it_was_and_leaves_no_process(marks, folder, number):
    process = started(marks, folder)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    wait_for(lambda: all(ended(pid) for pid in workers(marks)))
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert error.strip() == f"interrupted: 3 of 6 results are in {folder}; the same command continues from there"
    assert times_done(marks) == {f"task-{n}": 1 for n in range(3)}
    (marks / "hold").unlink()
    run = folder_of(marks, folder)
    assert run.run(2) == []
    assert times_done(marks) == {f"task-{n}": 1 for n in range(6)}
    assert len(run.records) == 2
    assert run.conclude().criteria[0].measured == "6 squares"
