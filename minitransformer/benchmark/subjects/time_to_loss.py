"""Training time to a target loss: speed and recipe together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from minitransformer.benchmark.case import JUDGE, Absent, BenchSetting, Case, Contestant, Subject, Work

RECIPES = ("classic", "modern")


class TimeToLoss(Subject, name="time-to-loss"):
    """Seconds of training to the target validation loss; a target is a character.

    Every sample is a new training with another seed; validation time is not counted. "classic" is nanoGPT's recipe in
    our code, "modern" is ours (Muon, rotary positions, QK-norm, squared ReLU, untied head) with the same sizes, both in
    the precision that `train.py` chooses.
    """

    about = f"seconds of training to a {JUDGE.title} (--target-loss)"

    def cases(self) -> Iterator[Case]:
        title = f"training to a {JUDGE.label} of {self.setting.target_loss:g}"
        yield Case.of(title, "s", _entries(self.setting), lower_is_better=True, warmup=False)


def _entries(setting: BenchSetting) -> Iterator[Contestant | Absent]:
    if setting.against:
        yield Contestant("nanoGPT", partial(_work, setting, "nanogpt"), base=True)
    else:
        yield Absent("nanoGPT", "give a checkout with --against")
    for recipe in RECIPES:
        yield Contestant(f"ours {recipe}", partial(_work, setting, recipe), base=recipe == "classic")


def _work(setting: BenchSetting, recipe: str) -> Work:
    from minitransformer.benchmark.learning import seconds_to_loss

    return Work(partial(seconds_to_loss, setting, recipe))
