"""Every residual placement as its users meet it: trained, resumed, compiled, sampled from a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.residual import Place, PreLN, Residual
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.text.datasets.text import PreparedText
from minitransformer.training.optimizers import Optimizer, Rates, build_optimizers
from tests.placements_for_tests import OURS, choosing
from tests.runs_for_tests import assert_resumes_exactly, configured, trainer_for

SETTINGS = Rates(lr=1e-2, embedding_lr=1e-2, head_lr=1e-2, weight_decay=0.0)
every_placement = pytest.mark.parametrize("name", list(Residual.registry))
every_topology = pytest.mark.parametrize("topology", ["decoder", "encoder", "encoder-decoder"])


def model_of(name: str, topology: str, **choices: Any) -> Model:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 4, "num_heads": 2, "context_length": 16, "vocab_size": 9}
    return build_model(ModelConfig(topology=topology, residual=name, init="xavier", **{**sizes, **choices}))


def texts(model: Model, tokens: Tensor) -> list[Tensor]:
    """What the model reads: `tokens`, twice where there is a source and a target."""
    return [tokens, tokens] if model.config.topology == "encoder-decoder" else [tokens]


@pytest.mark.unchecked_shapes
@every_topology
@every_placement
def test_a_placement_learns(name: str, topology: str) -> None:
    model, tokens = model_of(name, topology), torch.arange(17).remainder(7)[None]
    (optimizer,) = build_optimizers(Optimizer.choose("adamw"), model, SETTINGS)
    losses = []
    for step in range(30):
        model.begin_step(step)
        loss = F.cross_entropy(model(*texts(model, tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
    assert losses[-1] < 0.7 * losses[0]


COMPILED = """
import sys, torch
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model

tokens = torch.arange(8)[None]
for name in sys.argv[2:]:
    torch._dynamo.reset()
    layers = 4 if name == "mix" else 2
    sizes = {"d_model": 16, "num_layers": layers, "num_heads": 2, "context_length": 16, "vocab_size": 9}
    model = build_model(ModelConfig(topology=sys.argv[1], residual=name, init="xavier", **sizes))
    inputs = [tokens, tokens] if sys.argv[1] == "encoder-decoder" else [tokens]
    # The graph of a placement is that of its equations, whatever the topology: one of them is differentiated for all.
    differentiated = sys.argv[1] == "decoder" or name == "pre"
    compiled = torch.compile(model, backend="aot_eager" if differentiated else "eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    compiled(*inputs).logsumexp(-1).sum().backward()
    print(name)
"""


@pytest.mark.slow
@every_topology
def test_every_placement_compiles_as_one_graph_that_computes_the_same(topology: str) -> None:
    # In a process of its own: the compiler cannot read the checks that the tests put around signatures.
    done = subprocess.run([sys.executable, "-c", COMPILED, topology, *OURS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == OURS


@pytest.mark.unchecked_shapes
@every_placement
def test_an_interrupted_run_of_a_placement_ends_as_an_uninterrupted_one(
    name: str, text: PreparedText, tmp_path: Path
) -> None:
    assert_resumes_exactly(tmp_path, text, configured(init="xavier", dropout=0.1, **choosing(name)))


@pytest.fixture
def toy() -> Iterator[type[Residual]]:
    class Damped(PreLN, name="toy-damped"):
        """x ← x + a_l f(N(x)), where a_l falls with depth and learns."""

        def __init__(self, settings: Any, make_norm: Any, dropout: float, place: Place) -> None:
            super().__init__(settings, make_norm, dropout, place)
            self.damping = nn.Parameter(torch.tensor(1 / (1 + place.layer)))

        def forward(self, x: Tensor, sublayer: Any) -> Tensor:
            return x + self.damping * self.dropout(sublayer(self.norm(x)))

    yield Damped
    del Residual.registry["toy-damped"]


def test_a_placement_from_outside_the_package_is_trained_by_its_name(
    toy: type[Residual], text: PreparedText, tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path / "run", text, configured(residual="toy-damped"))
    before = trainer.learner.model.stack.blocks[1].attention_residual.damping.item()
    assert before == 0.5
    trainer.train()
    model = Run.open(tmp_path / "run").load_model("latest")
    assert isinstance(model.stack.blocks[1].attention_residual, toy)
    assert model.stack.blocks[1].attention_residual.damping.item() != before
