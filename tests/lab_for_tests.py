"""Experiments that measure nothing, to see how they are run: they leave a mark for each task that they did."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.lab.experiment import Criterion, Experiment, Findings
from minitransformer.reporting.tables import Table


class Toy(Experiment, name="toy"):
    """The squares of numbers; `settings.data` is the folder of its marks.

    Where that folder has a file "hold", tasks from the third on wait for it to go.
    """

    title = "Squares of numbers"
    question = "Is the square of a number what it is said to be?"
    source = "Euclid, Elements, book II"
    minutes = 0.1
    must_hold = True
    needs_data = True

    def prepare(self):
        if (Path(self.settings.data) / "offline").exists() and self.needs_data:
            (Path(self.settings.data) / "asked").open("a").write("asked\n")
            raise UserError("there is no text: download it")

    def tasks(self):
        return [{"number": n, "seed": n % 2} for n in range(2 if self.settings.quick else 6)]

    def measure(self, task):
        marks = Path(self.settings.data)
        (marks / f"began-{os.getpid()}").touch()
        while task["number"] > 2 and (marks / "hold").exists():
            time.sleep(0.01)
        with (marks / f"task-{task['number']}").open("a") as file:
            file.write("done\n")
        return {"square": task["number"] ** 2, "threads": os.environ["OMP_NUM_THREADS"]}

    def conclude(self, results):
        rows = [(result.task["number"], result.measured["square"]) for result in results]
        right = all(n * n == square for n, square in rows)
        criteria = [
            Criterion("squares are n² for every number that was tried", f"{len(rows)} squares", right),
            Criterion("squares are even", f"{sum(s % 2 == 0 for _, s in rows)} of {len(rows)}", False, must_hold=False),
            Criterion("most squares end in 6", "too few to say", None, must_hold=False),
        ]
        return Findings(criteria, [Table("Squares of n", ["n", "square, <n²>"], rows)], remarks=["One remark."])


class CuriousToy(Toy, name="toy-curious"):
    """The square of each number that was the square of one before, as long as it has one digit."""

    title = "Squares of squares"

    def tasks(self):
        return [{"number": n, "seed": 0} for n in (0, 2)]

    def further_tasks(self, results):
        squares = [result.measured["square"] for result in results]
        return [{"number": square, "seed": 0} for square in squares if square < 10]


class WrongToy(Toy, name="toy-wrong"):
    """A claim that must hold and does not."""

    title = "A claim that fails"

    def conclude(self, results):
        return Findings([Criterion("squares are odd", "half of them", False)])


class FailingToy(Toy, name="toy-failing"):
    """One task raises an exception as long as there is a file "broken"; another is killed."""

    title = "Tasks that fail"

    def measure(self, task):
        broken = (Path(self.settings.data) / "broken").exists()
        if broken and task["number"] == 1:
            raise ZeroDivisionError("no inverse\nof nothing")
        if broken and task["number"] == 2:
            os.kill(os.getpid(), 9)
        return super().measure(task)


class MendableToy(Toy, name="toy-mendable"):
    """Something that the user can mend."""

    title = "Data that is missing"

    def measure(self, task):
        raise UserError("there are no numbers: bring some")


def doubled(task, factor=2):
    """With what it was measured."""
    import torch

    threads = torch.get_num_threads()
    return {"doubled": factor * task["number"], "torch_threads": threads, "process": os.getpid()}


def sleeps_beside_a_child(task):
    """The first time, the processes at work: this one, and one that it has started; then it sleeps."""
    pids = Path(task["file"])
    if pids.exists():
        time.sleep(60)
    child = subprocess.Popen(["sleep", "60"])
    pids.write_text(str(child.pid))
    return {"pids": [os.getpid(), child.pid]}
