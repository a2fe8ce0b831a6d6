"""E10: placements with the mistakes that published code has had, to see which criterion notices each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from minitransformer.architecture.residual import DeepNorm, Place, PostLN, PreLN, Residual
from minitransformer.architecture.residual.base import MakeNorm, Sublayer
from minitransformer.lab.experiment import Criterion, Experiment, Findings, Measurement, Result, Settings, Table, Task
from minitransformer.lab.experiments.forward import ForwardStatistics
from minitransformer.lab.experiments.gradients import GradientAgainstDepth
from minitransformer.lab.experiments.identities import Identities
from minitransformer.lab.subjects import MakeModel, Placement, make_model
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model

# Each takes the place of its parent, without a name of its own: nobody can choose it.


class InvertedBeta(DeepNorm):
    """β = (8L)^¼: the sign of the exponent is lost, as in released baselines."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        alpha, beta = DeepNorm.constants(place)
        return alpha, 1 / beta


class FixedAlpha(DeepNorm):
    """α of a stack of 32 layers at every depth, as in released baselines."""

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        return (2 * 32) ** 0.25, DeepNorm.constants(place)[1]


class NoFinalNorm(PreLN):
    """Nothing normalises what the head reads."""

    has_final_norm = False


class TwoFinalNorms(PreLN):
    """The stack's own final norm, and one more before the head."""

    @classmethod
    def make_final_norm(cls, make_norm: MakeNorm) -> nn.Module:
        return nn.Sequential(make_norm(), make_norm())


class FinalNormAfterPost(PostLN):
    """Post-LN with Pre-LN's final norm: the last layer is normalised twice."""

    has_final_norm = True


class IdleLayers(PreLN):
    """The second half of the layers does nothing."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x if self.place.layer >= self.place.num_layers // 2 else super().forward(x, sublayer)


@dataclass(frozen=True)
class Defect:
    """A mistake, and the class that has it (None: no mistake)."""

    title: str
    placement: type[Residual] | None

    def make(self, config: ModelConfig, seed: int) -> Model:
        """`make_model`, in a library with this mistake."""
        with _in_place_of_parent(self.placement):
            return make_model(config, seed)


@contextmanager
def _in_place_of_parent(placement: type[Residual] | None) -> Iterator[None]:
    if placement is None:
        yield
        return
    right = Residual.registry[placement.name]
    Residual.registry[placement.name] = placement
    try:
        yield
    finally:
        Residual.registry[placement.name] = right


DEFECTS = {
    "none": Defect("no defect", None),
    "inverted-beta": Defect("DeepNorm's β with the exponent's sign inverted", InvertedBeta),
    "fixed-alpha": Defect("DeepNorm's α fixed to that of 32 layers", FixedAlpha),
    "no-final-norm": Defect("no final norm under Pre-LN", NoFinalNorm),
    "two-final-norms": Defect("two final norms under Pre-LN", TwoFinalNorms),
    "final-norm-after-post": Defect("a final norm under Post-LN", FinalNormAfterPost),
    "idle-layers": Defect("layers that do nothing under Pre-LN", IdleLayers),
}


class Audit(Experiment, name="E10"):
    """The criteria of E0, E1 and E3, in a reduced form, judge models with one defect each, and a healthy one."""

    title = "Audit: which criterion notices which mistake"
    question = "Would the criteria of E0, E1 and E3 notice the mistakes that published placements have had?"
    source = "mistakes of released baselines, injected into copies of the placements"
    minutes = 0.5

    def tasks(self) -> Sequence[Task]:
        return [{"defect": defect, "experiment": experiment} for defect in DEFECTS for experiment in EXPERIMENTS]

    def measure(self, task: Task) -> Measurement:
        experiment = EXPERIMENTS[task["experiment"]](DEFECTS[task["defect"]].make)
        asked = experiment.tasks()
        findings = experiment.conclude([Result(each, experiment.measure(each)) for each in asked])
        return {
            "criteria": len(findings.criteria),
            "flags": [[c.claim, c.measured] for c in findings.criteria if c.holds is False],
        }

    def conclude(self, results: Sequence[Result]) -> Findings:
        rows = [
            (DEFECTS[result.task["defect"]].title, result.task["experiment"], claim, measured)
            for result in results
            for claim, measured in result.measured["flags"]
        ]
        defects = [name for name in DEFECTS if any(result.task["defect"] == name for result in results)]
        return Findings(
            [_judge(name, [result for result in results if result.task["defect"] == name]) for name in defects],
            [Table("Criteria that failed", ["defect", "experiment", "criterion", "measured"], rows)],
            remarks=REMARKS,
        )


REMARKS = (
    "A defect is a class that takes the place of the right one while a model is made; E0, E1 and E3 then measure and "
    "judge as they always do, with fewer placements, sizes and seeds. Flagged is what fails, and not what is open.",
    "Two final norms are one at initialisation, where gains are 1 and N(N(x)) = N(x): only E0, which draws gains anew "
    "and counts norms, can see them.",
)


def _judge(defect: str, results: Sequence[Result]) -> Criterion:
    flags = [f"{result.task['experiment']}: {claim}" for result in results for claim, _ in result.measured["flags"]]
    total = sum(result.measured["criteria"] for result in results)
    measured = f"by {len(flags)} of {total} criteria" + "".join(f"; {flag}" for flag in flags)
    if DEFECTS[defect].placement is None:
        return Criterion("a healthy library is flagged by no criterion", measured, not flags)
    return Criterion(f"{DEFECTS[defect].title}: flagged", measured, bool(flags))


def _reduced(make: MakeModel, *, kind: type[Experiment], sizes: Mapping[str, Any]) -> Experiment:
    """The experiment's reduced form, with other models and sizes."""
    experiment = kind(Settings(quick=True))
    for name, value in {"make": make, **sizes}.items():
        assert hasattr(experiment, name)
        setattr(experiment, name, value)
    return experiment


EXPERIMENTS = {
    "E0": partial(_reduced, kind=Identities, sizes={}),
    "E1": partial(
        _reduced,
        kind=GradientAgainstDepth,
        sizes={
            "placements": (Placement("post"), Placement("pre"), Placement("deepnorm")),
            "modes": ("real",),
            "first_layers": (),
            "depths": (2, 4, 8, 16),
            "seeds": 4,
        },
    ),
    "E3": partial(_reduced, kind=ForwardStatistics, sizes={"placements": ("post", "pre")}),
}
