"""Every placement beside a second statement of its equation: what is right equals it, and what is not does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.residual import HybridNorm, OLMo2, Place, Residual
from minitransformer.architecture.residual.base import MakeNorm, Sublayer
from minitransformer.lab.defects import DEFECTS
from minitransformer.lab.equations import STATEMENTS, Depth, StatedStack, states
from minitransformer.lab.experiment import ExperimentSettings
from minitransformer.lab.experiments.identities import Identities, checks_of
from minitransformer.lab.stated import FORMS, form_config, stated_checks
from minitransformer.lab.subjects import MakeModel, make_model
from minitransformer.models.model import build_model
from minitransformer.tasks.task import Result

PLACEMENTS = tuple(Residual.registry)
BROKEN = {name: defect for name, defect in DEFECTS.items() if defect.placement is not None}
NEED_MEMORY = {
    "TorchscaleBeta",
    "AlphaOfTheOtherStack",
    "CrossAttentionUnnormalised",
    "LayerNormScalingGoesOn",
    "KeelForgetsCrossAttention",
    "MixByTheOtherStack",
    "HybridCrossAttention",
    "B2TAtCrossAttention",
}
"""mistakes that only an encoder-decoder has"""


def failures(residual: str, make: MakeModel = make_model, seed: int = 0) -> dict[str, str]:
    """The checks of a placement that fail, and what they say."""
    failed = {}
    for name, check in stated_checks(residual).items():
        outcome = check.measure(make, seed)
        if outcome.distance is None or outcome.distance > check.tolerance:
            failed[name] = outcome.note
    return failed


@pytest.mark.parametrize("residual", PLACEMENTS)
def test_every_placement_equals_a_second_statement_in_a_decoder_and_an_encoder_decoder(residual):
    if residual not in STATEMENTS:
        pytest.skip(f"no second statement of {residual!r} is given")
    assert {f"{residual}-decoder", f"{residual}-encoder-decoder"} <= set(stated_checks(residual))
    assert failures(residual) == {}


@pytest.mark.slow
@given(seed=st.integers(0, 2**20), residual=st.sampled_from(PLACEMENTS))
def test_a_second_statement_holds_for_every_seed(seed, residual):
    assume(residual in STATEMENTS)
    assert failures(residual, seed=seed) == {}


@pytest.mark.parametrize("form", FORMS)
def test_the_stacks_that_are_stated_are_those_of_the_model(form):
    model = build_model(form_config("pre", form))
    for name, depth in FORMS[form].items():
        places = {connection.place for connection in getattr(model, name).connections}
        assert {Depth(p.num_layers, p.partner_layers, p.has_memory) for p in places} == {depth}
        assert len(places) == depth.sublayers


def are_noticed(names: Iterable[str]) -> None:
    """Raises if mistakes are not noticed in the models that have them, or are in those that do not."""
    for name in names:
        defect = BROKEN[name]
        residual = defect.placement.name
        failed = failures(residual, defect.make)
        for form, has_it in {"decoder": name not in NEED_MEMORY, "encoder-decoder": True}.items():
            noticed = {f"{residual}-{form}", f"{residual}-profile-{form}"} & set(failed)
            assert bool(noticed) == has_it, (name, form)


def test_a_mistake_is_noticed_in_the_models_that_have_it():
    are_noticed(["LayerNormScalingWithoutRoot", "LayerNormScalingGoesOn", "AdminFromVariance", "B2TWithoutGains"])


@pytest.mark.slow
@pytest.mark.parametrize("residual", PLACEMENTS)
def test_every_mistake_is_noticed_in_the_models_that_have_it(residual):
    are_noticed(name for name, defect in BROKEN.items() if defect.placement.name == residual)


def test_every_placement_of_the_package_has_a_mistake_to_be_noticed():
    ours = {name for name in PLACEMENTS if Residual.named(name).__module__.startswith("minitransformer.")}
    assert {defect.placement.name for defect in BROKEN.values()} == ours


def test_norms_of_attention_that_belong_to_another_paper_are_noticed(monkeypatch):
    monkeypatch.setattr(OLMo2, "asks_for", HybridNorm.asks_for)
    assert set(failures("olmo2")) == {"olmo2-decoder", "olmo2-encoder-decoder"}
    monkeypatch.setattr(HybridNorm, "asks_for", {"qk_norm": "full"})
    assert set(failures("hybrid")) == {"hybrid-decoder", "hybrid-encoder-decoder"}


def test_an_initialisation_that_the_paper_has_not_is_noticed(monkeypatch):
    monkeypatch.setattr(HybridNorm, "asks_for", {**HybridNorm.asks_for, "init": "xavier"})
    assert all("initial weights" in note for note in failures("hybrid").values())
    assert failures("hybrid")


@pytest.fixture
def brought() -> Iterator[str]:
    """The name of a placement that somebody brings."""

    class Gated(Residual, name="toy-gated"):
        """x ← x + a f(x), from a = 0."""

        def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
            super().__init__(settings, nn.Identity, dropout, place)
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
            return x + self.gate * self.dropout(sublayer(x))

    yield Gated.name
    del Residual.registry[Gated.name]
    STATEMENTS.pop(Gated.name, None)


def state_gated(factor: float) -> None:
    @states("toy-gated", starts={"gate": 0.0})
    def gated(x: Tensor, stack: StatedStack) -> Tensor:
        for branch in stack.branches:
            x = x + factor * branch.weight("gate") * branch.f(x)
        return x


def criteria_of(residual: str) -> list[Any]:
    experiment = Identities(ExperimentSettings(quick=True))
    assert residual in experiment.placements
    tasks = [task for task in experiment.tasks() if task["check"] in stated_checks(residual)]
    return list(experiment.conclude([Result(task, experiment.measure(task)) for task in tasks]).criteria)


def test_a_placement_without_a_second_statement_is_left_open_by_its_name(brought):
    criteria = criteria_of(brought)
    assert [criterion.holds for criterion in criteria] == [None] * len(FORMS)
    assert all("'toy-gated' has no second statement" in criterion.measured for criterion in criteria)


def test_a_placement_from_outside_can_be_stated_beside_its_class(brought):
    state_gated(1.0)
    assert all(criterion.holds for criterion in criteria_of(brought))
    state_gated(1.001)
    assert not any(criterion.holds for criterion in criteria_of(brought))


def test_checks_of_some_placements_leave_out_those_of_others():
    assert set(checks_of(["pre"])) - set(checks_of([])) == set(stated_checks("pre"))
