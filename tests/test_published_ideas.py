"""Published ideas as a user would bring them, each in a file of `tests/plugins`: the interfaces have room for them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer import plugins
from minitransformer.architecture.linear import OutputProjection
from minitransformer.architecture.norms import LayerNorm, Norm
from minitransformer.architecture.residual import Place, Residual
from minitransformer.lab.equations import STATEMENTS
from minitransformer.lab.stated import stated_checks
from minitransformer.lab.subjects import make_model
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from tests.placements_for_tests import nudged
from tests.runs_for_tests import assert_resumes_exactly, configured

PLUGINS = Path(__file__).parent / "plugins"
Bring = Callable[[str], Any]


@pytest.fixture
def bring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bring]:
    """Loads a file of `tests/plugins`, whose names are known until the end of a test."""
    for family in (Residual, Norm):
        ours = {name: kind for name, kind in family.registry.items() if kind.__module__.startswith("minitransformer.")}
        monkeypatch.setattr(family, "registry", ours)
    stated = dict(STATEMENTS)
    monkeypatch.setattr(plugins, "_loaded", {})

    def load(name: str) -> Any:
        plugins.load_plugin(PLUGINS / f"{name}.py")
        return sys.modules[f"minitransformer_plugin_{name}"]

    yield load
    STATEMENTS.clear()
    STATEMENTS.update(stated)


def model_of(residual: Any, **choices: Any) -> Model:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 4, "num_heads": 2, "context_length": 16, "vocab_size": 9}
    return build_model(ModelConfig(residual=residual, **{**sizes, **choices}))


def linear_connection(residual: Any, features: int = 6) -> tuple[Any, Any, nn.Linear]:
    """A connection of the stack's second layer, the stack's part, and a linear sublayer, in float64."""
    places = [Place(layer, 2, name, d_model=features) for layer in range(2) for name in ("attention", "feedforward")]
    connection = residual.make(lambda: nn.LayerNorm(features), 0.0, places[2])
    shared = residual.variant.Shared(residual.settings, places)
    return connection.double(), shared.double(), nn.Linear(features, features).double()


def test_a_branch_of_prores_grows_with_the_step_the_later_the_deeper(bring: Bring) -> None:
    residual = bring("prores").ProRes.choose(warmup_steps=8)
    model = model_of(residual)
    shares = []
    for step in (0, 1, 4, 8, 100):
        model.begin_step(step)
        shares.append([connection.share.item() for connection in model.stack.connections[::2]])
    # 8 steps in the last of four layers, 8 / 4 in the first, and a line between them.
    expected = [[min(1.0, step / warmup) for warmup in (2, 4, 6, 8)] for step in (0, 1, 4, 8, 100)]
    torch.testing.assert_close(torch.tensor(shares), torch.tensor(expected))
    connection, _, f = linear_connection(residual)
    connection.begin_step(2)
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(connection(x, f), x + 0.25 * f(F.layer_norm(x, (6,))))


def test_a_model_of_prores_that_is_opened_has_the_shares_that_it_was_trained_with(bring: Bring) -> None:
    residual = bring("prores").ProRes.choose(warmup_steps=8)
    trained, opened = model_of(residual), model_of(residual)
    trained.begin_step(3)
    opened.load_state_dict(trained.state_dict())
    tokens = torch.arange(9)[None]
    assert torch.equal(opened(tokens), trained(tokens))


def test_hyper_connections_equal_their_second_statement(bring: Bring) -> None:
    bring("hyper_connections")
    for name, check in stated_checks("hyper-connections").items():
        outcome = check.measure(make_model, 0)
        assert outcome.distance is not None, outcome.note
        assert outcome.distance <= check.tolerance, (name, outcome.note)


def test_hyper_connections_start_as_pre_ln(bring: Bring) -> None:
    """Each sublayer reads one of n streams, which are all alike, and writes to all: n times Pre-LN's stream."""
    norm = LayerNorm.choose(eps=1e-12)  # which the sum of n streams would make less of
    hyper = model_of(bring("hyper_connections").HyperConnections.choose(streams=3), norm=norm)
    plain = model_of("pre", norm=norm)
    plain.load_state_dict({key: hyper.state_dict()[key] for key in plain.state_dict()})
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(hyper(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


def lengths(model: Model) -> Tensor:
    """‖·‖ of what nGPT normalises: rows that read the stream, columns that write to it, embeddings."""
    found = [
        module.weight.norm(dim=0 if isinstance(module, OutputProjection) else -1)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    return torch.cat(found)


def test_weights_of_ngpt_have_length_1_from_the_start_and_after_each_update(bring: Bring) -> None:
    model = model_of(bring("ngpt").NormalisedTransformer.choose())
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.end_step()
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)))


def test_a_connection_of_ngpt_goes_some_way_along_the_sphere(bring: Bring) -> None:
    connection, shared, f = linear_connection(bring("ngpt").NormalisedTransformer.choose())
    x = shared.open(torch.randn(3, 6).double())
    with torch.no_grad():
        connection.alpha.copy_(torch.linspace(-2, 2, 6))
    branch = f(x) / f(x).norm(dim=-1, keepdim=True)
    expected = x + (torch.linspace(-2, 2, 6).double() * 0.05 * 6**0.5).abs() * (branch - x)
    torch.testing.assert_close(connection(x, f), expected / expected.norm(dim=-1, keepdim=True))


def test_seednorm_starts_as_rms_norm_and_then_has_gains_that_follow_its_input(bring: Bring) -> None:
    norm = bring("seednorm").SeeDNorm.choose(eps=1e-6).make(6).double()
    x = torch.randn(5, 6).double()
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), rms)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    expected = [(torch.tanh(row @ norm.beta) * norm.alpha + norm.weight) * out for row, out in zip(x, rms, strict=True)]
    torch.testing.assert_close(norm(x), torch.stack(expected))


def test_derf_is_the_error_function_of_each_feature(bring: Bring) -> None:
    norm = bring("derf").Derf.choose().make(3).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(5, 3).double()
    slope, shift = norm.slope.item(), norm.shift.item()
    erf = torch.tensor([[math.erf(slope * value + shift) for value in row] for row in x.tolist()]).double()
    torch.testing.assert_close(norm(x), erf * norm.weight + norm.bias)


BROUGHT: dict[str, dict[str, str]] = {
    "prores": {"residual": "prores"},
    "hyper_connections": {"residual": "hyper-connections"},
    "ngpt": {"residual": "ngpt"},
    "seednorm": {"norm": "seednorm"},
    "derf": {"norm": "derf"},
}
every_idea = pytest.mark.parametrize("file", BROUGHT)


@every_idea
def test_every_parameter_of_an_idea_gets_a_gradient_and_its_weights_make_the_same_model_again(
    file: str, bring: Bring, shake: Any
) -> None:
    bring(file)
    model, again = (model_of(**{"residual": "pre", **BROUGHT[file], "init": init}) for init in ("gpt2", "xavier"))
    tokens = torch.randint(0, 9, (2, 8))
    nudged(model)(tokens).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens), model(tokens))


@every_idea
def test_an_idea_decodes_from_a_cache_as_without_one(file: str, bring: Bring, shake: Any) -> None:
    bring(file)
    model, tokens = shake(model_of(**{"residual": "pre", **BROUGHT[file]})).double(), torch.randint(0, 9, (2, 9))
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in tokens.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


@pytest.mark.unchecked_shapes
@every_idea
def test_an_interrupted_run_of_an_idea_ends_as_an_uninterrupted_one(file, bring, text, tmp_path):
    bring(file)
    assert_resumes_exactly(tmp_path, text, configured(dropout=0.1, **BROUGHT[file]))


LAWS = ("test_norms", "test_block", "test_residual", "test_placements", "test_lab_equations")


def laws_over(file: str, *modules: str) -> subprocess.CompletedProcess[str]:
    """`python -m pytest --plugin FILE` for the laws in some modules over what the file brings."""
    tests, (name,) = [f"tests/{module}.py" for module in modules], BROUGHT[file].values()
    command = [sys.executable, "-m", "pytest", "-n", "0", *tests, "-k", name, "--plugin", f"tests/plugins/{file}.py"]
    return subprocess.run(command, cwd=PLUGINS.parent.parent, capture_output=True, text=True)


def test_laws_run_over_what_a_plugin_brings() -> None:
    done = laws_over("derf", "test_norms")
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.split("[100%]")[0].count(".") >= 3


@pytest.mark.slow
@every_idea
def test_every_law_holds_for_an_idea(file: str) -> None:
    done = laws_over(file, *LAWS)
    assert done.returncode == 0, done.stdout[-2000:]
