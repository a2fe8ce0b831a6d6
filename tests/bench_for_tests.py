"""Contestants whose clock is a fake, and settings in which benchmarks take no time."""

import math
import os
from functools import partial

from minitransformer.benchmark.case import BenchSetting, Case, Contestant, Cost
from minitransformer.benchmark.limits import Limits
from minitransformer.benchmark.rounds import RoundsPlan
from minitransformer.benchmark.shape import Shape
from minitransformer.benchmark.workers import ContestantFailed

PLAN = RoundsPlan(rounds=11, warmup=1)
TINY = BenchSetting(Shape(1, 2, 16, 16, 31, 2), tokens=4, seconds=1e-6, megabytes=0.05, target_loss=3.4)
LIMITS = Limits({"fp32": 100.0, "bf16": 200.0}, 10.0)


class Fake:
    """A contestant whose samples are numbers that it is given; it notes when it was asked."""

    def __init__(self, prepare):
        self.values, self.asked = prepare()
        self.closed = False
        Fake.all.append(self)

    def cost(self, deadline=math.inf):
        if not self.values:
            raise ContestantFailed("it has no wheels")
        return Cost(1.0, 2.0)

    def sample(self, deadline=math.inf):
        value = self.values[len(self.asked) % len(self.values)]
        self.asked.append(value)
        if value < 0:
            raise ContestantFailed("it fell over")
        if value == 0:
            raise KeyboardInterrupt
        return value

    def close(self):
        self.closed = True


def case_of(lower_is_better=False, fresh=False, warmup=True, **values):
    contestants = [Contestant(name, partial(lambda row: (row, []), row)) for name, row in values.items()]
    return Case.of("race", "laps/s", contestants, lower_is_better=lower_is_better, fresh=fresh, warmup=warmup)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
