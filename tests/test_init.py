"""Initialisations: every weight is drawn as its scheme says, and none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.init import GPT2, Initialisation, initialise
from minitransformer.architecture.linear import OutputProjection
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme, PositionSpace
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model

every_scheme = pytest.mark.parametrize("name", Initialisation.registry)
LAYERS, D, D_FF, VOCABULARY = 3, 64, 256, 500


def model_of(name: str, **choices: Any) -> DecoderLM:
    sizes = {"d_model": D, "num_layers": LAYERS, "num_heads": 4, "context_length": 64, "vocab_size": VOCABULARY}
    return build_model(ModelConfig(**{**sizes, "init": name, "bias": True, "positions": "learned", **choices}))


EXPECTED: dict[str, dict[str, float]] = {
    "gpt2": {
        "query": 0.02,
        "up": 0.02,
        "output": 0.02 / (2 * LAYERS) ** 0.5,
        "down": 0.02 / (2 * LAYERS) ** 0.5,
        "embedding": 0.02,
        "head": 0.02,
    },
    "xavier": {
        "query": (2 / (D + D)) ** 0.5,
        "up": (2 / (D + D_FF)) ** 0.5,
        "output": (2 / (D + D)) ** 0.5,
        "down": (2 / (D + D_FF)) ** 0.5,
        "embedding": D**-0.5,
        "head": D**-0.5,
    },
    "xavier-scaled": {
        "query": (2 / (D + D)) ** 0.5,
        "up": (2 / (D + D_FF)) ** 0.5,
        "output": (2 / (D + D)) ** 0.5 / (2 * LAYERS) ** 0.5,
        "down": (2 / (D + D_FF)) ** 0.5 / (2 * LAYERS) ** 0.5,
        "embedding": D**-0.5,
        "head": D**-0.5,
    },
    "small": dict.fromkeys(("query", "up", "output", "down", "embedding", "head"), (2 / (5 * D)) ** 0.5),
    "zero-output": {"query": 0.02, "up": 0.02, "output": 0.0, "down": 0.0, "embedding": 0.02, "head": 0.02},
}


def test_every_initialisation_of_the_package_has_its_numbers_here() -> None:
    ours = {name for name, kind in Initialisation.registry.items() if kind.__module__.startswith("minitransformer.")}
    assert set(EXPECTED) == ours


@pytest.mark.parametrize("name", EXPECTED)
def test_every_weight_has_the_stated_standard_deviation(name: str) -> None:
    model = model_of(name, tied_embeddings=False)
    found: dict[str, list[Tensor]] = {
        "query": [getattr(b.attention, part).weight for b in model.stack.blocks for part in ("query", "key", "value")],
        "up": [block.feedforward.up.weight for block in model.stack.blocks],
        "output": [block.attention.output.weight for block in model.stack.blocks],
        "down": [block.feedforward.down.weight for block in model.stack.blocks],
        "embedding": [model.embedding.table.weight, model.stack.positions.table.weight],
        "head": [model.head.weight],
    }
    for kind, weights in found.items():
        for weight in weights:
            assert weight.std().item() == pytest.approx(EXPECTED[name][kind], rel=0.05), kind
            assert abs(weight.mean().item()) <= 5 * EXPECTED[name][kind] / weight.numel() ** 0.5, kind


@every_scheme
def test_biases_start_at_zero_and_norms_as_identity(name: str) -> None:
    for module in model_of(name, qk_norm="head").modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, Norm):
            assert module.weight.eq(1).all()
            assert getattr(module, "bias", None) is None or not module.bias.any()


def test_xavier_is_uniform() -> None:
    bound = (6 / (D + D)) ** 0.5
    weight = model_of("xavier").stack.blocks[0].attention.query.weight
    assert 0.98 * bound < weight.abs().max().item() <= bound


def test_a_stack_with_zero_outputs_starts_as_identity() -> None:
    model = model_of("zero-output", positions="none")
    x = torch.randn(1, 5, D)
    y = model.stack(x, positions=torch.arange(5)[None])
    torch.testing.assert_close(y, model.stack.final_norm(x))


class Counting(GPT2):
    """GPT-2's, with a note of what it was asked to draw."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def linear(self, weight: Tensor, num_sublayers: int = 1) -> None:
        self.drawn.append(id(weight))

    embedding = head = output_projection = linear


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_drawn_exactly_once_a_tied_head_with_its_embedding(tied: bool) -> None:
    model, scheme = model_of("gpt2", tied_embeddings=tied, feedforward="swiglu"), Counting()
    initialise(model, scheme)
    matrices = [id(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    assert sorted(scheme.drawn) == sorted(matrices)


def test_a_tied_head_starts_as_an_embedding_does() -> None:
    class Marked(GPT2):
        def embedding(self, weight: Tensor) -> None:
            nn.init.constant_(weight, 3.0)

        def head(self, weight: Tensor) -> None:
            nn.init.constant_(weight, 5.0)

    tied, untied = model_of("gpt2"), model_of("gpt2", tied_embeddings=False)
    initialise(tied, Marked.choose().make())
    initialise(untied, Marked.choose().make())
    assert tied.head.weight.eq(3).all()
    assert untied.head.weight.eq(5).all()
    assert untied.embedding.table.weight.eq(3).all()


def test_a_weight_that_no_rule_names_is_an_error() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    with pytest.raises(UserError, match="nothing initialises the weights of Gain"):
        initialise(nn.Sequential(nn.Linear(3, 3), Gain()), GPT2.choose().make())


def test_a_variant_s_own_weights_start_as_its_constructor_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PositionScheme, "registry", dict(PositionScheme.registry))

    class Offset(PositionScheme, name="toy-offset"):
        def __init__(self, settings: Any, space: PositionSpace) -> None:
            super().__init__(settings, space)
            self.offset = nn.Parameter(torch.full((space.d_model,), 3.0))

    assert model_of("zero-output", positions="toy-offset").stack.positions.offset.eq(3).all()


def test_a_module_that_resets_its_parameters_has_the_last_word_over_what_is_drawn_inside_it() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(3, 3), nn.Parameter(torch.empty(3))

        def reset_parameters(self) -> None:
            nn.init.eye_(self.linear.weight)
            nn.init.ones_(self.gain)

    gate = Gate()
    initialise(nn.Sequential(gate), GPT2.choose().make())
    assert torch.equal(gate.linear.weight, torch.eye(3))
    assert gate.gain.eq(1).all()


def test_the_same_seed_draws_the_same_model() -> None:
    torch.manual_seed(5)
    one = model_of("gpt2").state_dict()
    torch.manual_seed(5)
    other = model_of("gpt2").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_sublayers_write_through_output_projections() -> None:
    writers = [name for name, module in model_of("gpt2").named_modules() if isinstance(module, OutputProjection)]
    assert len(writers) == 2 * LAYERS
    assert {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in writers} == {
        "attention.output",
        "feedforward.down",
    }


def test_each_stack_of_an_encoder_decoder_counts_its_own_sublayers() -> None:
    sizes: dict[str, Any] = {"d_model": 64, "num_layers": 2, "num_decoder_layers": 12, "num_heads": 4}
    model = build_model(ModelConfig(topology="encoder-decoder", vocab_size=5, context_length=4, **sizes))
    for stack, num_sublayers in ((model.encoder, 2 * 2), (model.decoder, 3 * 12)):
        for branch in stack.blocks[0].branches:
            weight = next(m.weight for m in branch.sublayer.modules() if isinstance(m, OutputProjection))
            assert weight.std().item() == pytest.approx(0.02 / num_sublayers**0.5, rel=0.05)
