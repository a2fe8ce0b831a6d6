"""The experiments without data, in reduced forms: what must hold holds, and mistakes are noticed."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitransformer.lab.checks import small_model
from minitransformer.lab.defects import DEFECTS
from minitransformer.lab.experiment import Experiment, ExperimentSettings, Findings, between, exponent, geometric_mean
from minitransformer.lab.experiments import forward
from minitransformer.lab.experiments.audit import Audit
from minitransformer.lab.experiments.forward import Amplification, ForwardStatistics, forward_statistics
from minitransformer.lab.experiments.gradients import GradientAgainstDepth, GradientProfile, last_gradient
from minitransformer.lab.experiments.identities import CHECKS, Identities
from minitransformer.lab.subjects import MODES, Placement, loss, make_model, random_tokens
from minitransformer.tasks.task import Result

DEEP, POST, PRE = Placement("deepnorm"), Placement("post"), Placement("pre")
REDUCED: dict[type[Experiment], dict[str, Any]] = {
    Identities: {"placements": ("pre", "mix")},
    GradientAgainstDepth: {"seeds": 2, "depths": (2, 4, 8, 16), "modes": ("real",), "first_layers": ()},
    GradientProfile: {"seeds": 2, "depths": (6,)},
    ForwardStatistics: {"seeds": 10, "placements": ("post", "pre", "deepnorm")},
    Amplification: {"seeds": 2, "depths": (2, 4, 8, 16)},
}
DECIDING = {GradientAgainstDepth: 10, GradientProfile: 10, ForwardStatistics: 40, Amplification: 10}
"""seeds whose intervals lie within the accepted ranges"""


def reduced(kind: type[Experiment], **sizes: Any) -> Experiment:
    experiment = kind(ExperimentSettings(quick=True))
    for name, value in {**REDUCED[kind], **sizes}.items():
        assert hasattr(experiment, name)
        setattr(experiment, name, value)
    return experiment


def results_of(experiment: Experiment) -> list[Result]:
    return [Result(task, json.loads(json.dumps(experiment.measure(task)))) for task in experiment.tasks()]


@cache
def results(kind: type[Experiment]) -> list[Result]:
    return results_of(reduced(kind))


@cache
def findings(kind: type[Experiment]) -> Findings:
    return reduced(kind).conclude(results(kind))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("kind", REDUCED)
def test_no_mean_over_two_seeds_contradicts_what_must_hold(kind, monkeypatch):
    for module in ("minitransformer.lab.experiment", forward.__name__):
        monkeypatch.setattr(f"{module}.within", lambda value, low, high: low <= value.mean <= high)
    assert [c for c in reduced(kind).conclude(results(kind)).criteria if not c.holds] == []


@pytest.mark.slow
@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(("kind", "seeds"), DECIDING.items())
def test_what_must_hold_is_borne_out_by_the_intervals_of_enough_seeds(kind, seeds):
    experiment = reduced(kind, seeds=seeds)
    assert [c for c in experiment.conclude(results_of(experiment)).criteria if not c.holds] == []


@pytest.mark.parametrize("kind", REDUCED)
def test_every_criterion_is_a_known_result_with_its_measurement(kind):
    assert findings(kind).criteria
    assert all(criterion.must_hold and criterion.measured for criterion in findings(kind).criteria)


@pytest.mark.parametrize("kind", [GradientAgainstDepth, ForwardStatistics])
def test_the_same_task_gives_the_same_numbers_whatever_happened_before(kind):
    first = results(kind)[-1]
    torch.manual_seed(123)
    torch.randn(7)
    assert reduced(kind).measure(first.task) == first.measured


@pytest.mark.parametrize("kind", REDUCED)
def test_a_sweep_that_was_stopped_has_a_conclusion(kind):
    stopped = reduced(kind).conclude(results(kind)[:1])
    assert len(stopped.criteria) <= len(findings(kind).criteria)


@pytest.mark.parametrize("kind", [GradientAgainstDepth, GradientProfile, ForwardStatistics, Amplification])
def test_every_picture_can_be_drawn(kind):
    pytest.importorskip("matplotlib")
    assert findings(kind).pictures
    for picture in findings(kind).pictures:
        assert picture.draw().axes
        assert picture.caption


@pytest.mark.parametrize("kind", [*REDUCED, Audit])
def test_tasks_differ_and_the_reduced_form_has_no_more_of_them(kind):
    quick, full = (kind(ExperimentSettings(quick=quick)).tasks() for quick in (True, False))
    keys = [json.dumps(task, sort_keys=True) for task in full]
    assert len(set(keys)) == len(keys)
    assert len(quick) <= len(full)


def test_experiments_are_found_by_the_names_of_the_protocol():
    assert all(Experiment.named(name).question for name in ("E0", "E1", "E2", "E3", "E4", "E10"))


@given(seed=st.integers(0, 2**20), name=st.sampled_from([name for name in CHECKS if "constants" not in name]))
def test_identities_hold_for_every_seed(seed, name):
    check = CHECKS[name]
    assert check.measure(make_model, seed).distance <= check.tolerance


def small_norm() -> nn.Module:
    return small_model(make_model, "pre", 0).stack.final_norm


def test_theory_mode_attends_to_all_past_tokens_alike():
    model = MODES["theory"](make_model, PRE, 2, 0)
    hidden = torch.randn(1, 5, model.config.d_model)
    attended = model.stack.blocks[0].attention.value(hidden).cumsum(1) / torch.arange(1, 6)[:, None]
    connection = model.stack.blocks[0].attention_residual
    connection.norm = nn.Identity()
    seen = []
    model.stack.blocks[0].attention.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.stack(hidden, positions=torch.arange(5)[None])
    torch.testing.assert_close(seen[0], attended)


def test_embeddings_have_unit_variance_and_the_head_an_inverse_width():
    model = MODES["real"](make_model, PRE, 1, 0)
    x = model.embedding(random_tokens(0, 1)[0])
    assert x.square().mean().item() == pytest.approx(1, rel=0.05)
    assert model.head.weight.var().item() * model.config.d_model == pytest.approx(1, rel=0.05)


def test_deepnorm_without_beta_fails_the_slope():
    def without_beta(config, seed):
        model = make_model(config, seed)
        for connection in model.stack.connections:
            connection.beta = 1.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.initialise()
        return model

    experiment = reduced(GradientAgainstDepth, placements=(DEEP,), make=without_beta, seeds=5)
    (criterion,) = experiment.conclude(results_of(experiment)).criteria
    assert criterion.holds is False


def test_gradients_of_layers_that_do_nothing_are_no_power_law():
    assert last_gradient(DEFECTS["IdleLayers"].make, "real", PRE, 2, 0) == (0, 0)
    criterion = between("a slope", exponent([2, 4], [[1.0, 0.0]]), -1, 1)
    assert criterion.holds is False
    assert "a value is 0" in criterion.measured


def test_the_gradient_of_the_last_layer_is_autograds():
    model = MODES["real"](make_model, POST, 2, 3)
    tokens, targets = random_tokens(3, 2)
    loss(model(tokens), targets).backward()
    expected = model.stack.blocks[-1].feedforward.down.weight.grad.norm().item()
    assert last_gradient(make_model, "real", POST, 2, 3).norm == pytest.approx(expected, rel=1e-4)


def test_layers_that_are_never_called_change_nothing():
    measured = forward_statistics(DEFECTS["IdleLayers"].make, "pre", 4, 0)
    assert measured["change"][0] > 0.1
    assert measured["change"][2:] == [0, 0]
    assert measured["output"][1] == measured["output"][3]


NOTICED_BY = {"none": "E0", "InvertedBeta": "E1", "FixedAlpha": "E0", "IdleLayers": "E3"}
"""of the experiments that flag a defect, the one that is tried here; E0 for all others"""


@pytest.mark.slow
@pytest.mark.unchecked_shapes
def test_the_audit_flags_every_defect_and_no_healthy_model_and_says_by_which_criterion():
    experiment = Audit(ExperimentSettings(quick=True))
    wanted = [task for task in experiment.tasks() if task["experiment"] == NOTICED_BY.get(task["defect"], "E0")]
    audit = experiment.conclude([Result(task, experiment.measure(task)) for task in wanted])
    assert len(audit.criteria) == len(DEFECTS)
    assert [criterion for criterion in audit.criteria if not criterion.holds] == []
    rows = [row[:2] for table in audit.tables for row in table.rows]
    assert {defect for defect, _ in rows} == {DEFECTS[name].title for name in DEFECTS if name != "none"}
    assert (DEFECTS["IdleLayers"].title, "E3") in rows


def test_a_defect_leaves_the_placements_of_others_alone():
    broken, healthy, after = (
        make(config_of(POST), 0) for make in (DEFECTS["NoFinalNorm"].make, make_model, make_model)
    )
    assert all(torch.equal(x, y) for x, y in zip(broken.parameters(), healthy.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(after.parameters(), healthy.parameters(), strict=True))
    assert isinstance(make_model(config_of(PRE), 0).stack.final_norm, type(small_norm()))


def config_of(placement: Placement) -> Any:
    return MODES["real"](make_model, placement, 1, 0).config


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6))
def test_a_geometric_mean_lies_in_its_interval(values):
    mean = geometric_mean(values)
    assert mean.low <= mean.mean <= mean.high
    assert min(values) * (1 - 1e-9) <= mean.mean <= max(values) * (1 + 1e-9)
