"""E10: placements with injected defects, to see which criterion detects each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minitransformer.architecture.residual import Residual
from minitransformer.lab.defects import DEFECTS, Defect
from minitransformer.lab.experiment import Criterion, Experiment, ExperimentSettings, Findings
from minitransformer.lab.experiments.forward import ForwardStatistics
from minitransformer.lab.experiments.gradients import GradientAgainstDepth
from minitransformer.lab.experiments.identities import Identities
from minitransformer.lab.subjects import Placement
from minitransformer.reporting.tables import Table
from minitransformer.tasks.task import Measurement, Result, Task


class Audit(Experiment, name="E10"):
    """The criteria of E0, E1 and E3, in a reduced version, applied to models with one defect each, and with none."""

    title = "Audit: which criterion notices which mistake"
    question = "Would the criteria of E0, E1 and E3 notice a mistake in a placement?"
    source = "mistakes of released baselines, and for every placement one more, injected into copies of the placements"
    minutes = 1.2

    def tasks(self) -> Sequence[Task]:
        return [
            {"defect": name, "experiment": each}
            for name, defect in DEFECTS.items()
            for each in EXPERIMENTS
            if _looks_at(each, defect)
        ]

    def measure(self, task: Task) -> Measurement:
        experiment = _reduced(task["experiment"], DEFECTS[task["defect"]])
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
    "A defect is a class that takes the place of the right one while a model is made; E0, E1 and E3, where they look "
    "at that one, measure and judge as they always do, with fewer placements, sizes and seeds. Flagged is what fails, "
    "and not what is open.",
    "Two final norms are one at initialisation, where gains are 1 and N(N(x)) = N(x): only E0, which draws gains anew, "
    "can see them.",
)


def _judge(defect: str, results: Sequence[Result]) -> Criterion:
    flags = [f"{result.task['experiment']}: {claim}" for result in results for claim, _ in result.measured["flags"]]
    total = sum(result.measured["criteria"] for result in results)
    measured = f"by {len(flags)} of {total} criteria" + "".join(f"; {flag}" for flag in flags)
    if DEFECTS[defect].placement is None:
        return Criterion("a healthy library is flagged by no criterion", measured, not flags)
    return Criterion(f"flagged in {DEFECTS[defect].title}", measured, bool(flags))


def _looks_at(experiment: str, defect: Defect) -> bool:
    """Whether the experiment covers the placement with the defect; without a defect, all do."""
    return defect.placement is None or defect.placement.name in LOOK_AT[experiment]


def _reduced(name: str, defect: Defect) -> Experiment:
    """The reduced experiment, with the defect in its models; E0 covers only that placement."""
    kind, sizes = EXPERIMENTS[name]
    own = {} if name != "E0" or defect.placement is None else {"placements": (defect.placement.name,)}
    experiment = kind(ExperimentSettings(quick=True))
    for size, value in {"make": defect.make, **sizes, **own}.items():
        assert hasattr(experiment, size)
        setattr(experiment, size, value)
    return experiment


LOOK_AT: Mapping[str, Sequence[str]] = {
    "E0": tuple(Residual.registry),
    "E1": ("post", "pre", "deepnorm"),
    "E3": ("post", "pre"),
}
"""the placements of the reduced forms, by name"""
EXPERIMENTS: Mapping[str, tuple[type[Experiment], Mapping[str, Any]]] = {
    "E0": (Identities, {}),
    "E1": (
        GradientAgainstDepth,
        {
            "placements": tuple(Placement(name) for name in LOOK_AT["E1"]),
            "modes": ("real",),
            "first_layers": (),
            "depths": (2, 4, 8, 16),
            "seeds": 4,
        },
    ),
    "E3": (ForwardStatistics, {"placements": LOOK_AT["E3"]}),
}
"""with the sizes of their reduced forms"""
