"""Residual placements: each against its recurrence written out in float64, and a new one from outside the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.feedforward import FEEDFORWARDS
from minitransformer.architecture.norms import LayerNorm, Norm, RMSNorm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Place, PostLN, PreLN, ResiDual, Residual
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM

Sublayers = list[nn.Linear]
NormFunction = Callable[[Tensor], Tensor]


def post(x: Tensor, sublayers: Sublayers, norms: list[NormFunction], final: NormFunction | None) -> Tensor:
    for f, norm in zip(sublayers, norms, strict=True):
        x = norm(x + f(x).tanh())
    assert final is None
    return x


def pre(x: Tensor, sublayers: Sublayers, norms: list[NormFunction], final: NormFunction | None) -> Tensor:
    for f, norm in zip(sublayers, norms, strict=True):
        x = x + f(norm(x)).tanh()
    assert final is not None
    return final(x)


def residual(x: Tensor, sublayers: Sublayers, norms: list[NormFunction], final: NormFunction | None) -> Tensor:
    """The output as a sum over branches, rather than as a second stream."""
    branches = [x]
    for f, norm in zip(sublayers, norms, strict=True):
        branches.append(f(x).tanh())
        x = norm(x + branches[-1])
    assert final is not None
    return x + final(torch.stack(branches).sum(0))


def sandwich(x: Tensor, sublayers: Sublayers, norms: list[NormFunction], final: NormFunction | None) -> Tensor:
    for f, before, after in zip(sublayers, norms[::2], norms[1::2], strict=True):
        x = x + after(f(before(x)).tanh())
    assert final is not None
    return final(x)


def olmo2(x: Tensor, sublayers: Sublayers, norms: list[NormFunction], final: NormFunction | None) -> Tensor:
    for f, norm in zip(sublayers, norms, strict=True):
        x = x + norm(f(x).tanh())
    assert final is not None
    return final(x)


RECURRENCES = {"post": post, "pre": pre, "sandwich": sandwich, "olmo2": olmo2, "residual": residual}
every_placement = pytest.mark.parametrize("name", RECURRENCES)


def by_hand(norm: LayerNorm) -> NormFunction:
    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()

    return lambda x: normalised(x) * norm.weight + norm.bias


class Connections(nn.Module):
    """Some sublayers in their residual connections, as a stack would run them."""

    def __init__(self, name: str, features: int = 6, num_sublayers: int = 5) -> None:
        super().__init__()
        self.placement = Residual.named(name)
        self.sublayers = nn.ModuleList(nn.Linear(features, features) for _ in range(num_sublayers))
        self.residuals = nn.ModuleList(
            self.placement(lambda: LayerNorm(features), 0.0, Place(i // 2, num_sublayers // 2, "attention"))
            for i in range(num_sublayers)
        )
        self.final_norm = LayerNorm(features) if self.placement.has_final_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        stream = self.placement.open(x)
        for connection, f in zip(self.residuals, self.sublayers, strict=True):
            stream = connection(stream, lambda y, f=f: f(y).tanh())
        return self.placement.close(stream, self.final_norm)


def test_every_registered_placement_has_its_recurrence_here() -> None:
    assert set(Residual.registry) == set(RECURRENCES)


@every_placement
def test_a_placement_is_its_recurrence_in_values_and_gradients(name: str, shake: Any) -> None:
    connections = shake(Connections(name)).double()
    x = torch.randn(2, 3, 6).double().requires_grad_()
    final = by_hand(connections.final_norm) if connections.placement.has_final_norm else None
    norms = [by_hand(norm) for norm in connections.residuals.modules() if isinstance(norm, LayerNorm)]
    actual = connections(x)
    expected = RECURRENCES[name](x, list(connections.sublayers), norms, final)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *connections.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        rtol=1e-12,
        atol=1e-12,
    )


def test_one_step_of_each_placement_by_numbers() -> None:
    """With N(x) = 10 x and f(x) = x + 1, from x = 2 and, for ResiDual, y = 3."""

    class Tenfold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * x

    def one(placement: type[Residual], stream: Any) -> Any:
        return placement(Tenfold, 0.0, Place(0, 1, "attention"))(stream, lambda x: x + 1)

    x, y = torch.tensor(2.0), torch.tensor(3.0)
    assert one(PostLN, x) == 50
    assert one(PreLN, x) == 23
    assert one(ResiDual, (x, y)) == (50, 6)
    assert ResiDual.close((x, y), Tenfold()) == 32
    assert PreLN.close(x, Tenfold()) == 20


def test_the_normalised_stream_of_residual_is_post_ln_bit_for_bit(shake: Any) -> None:
    config = ModelConfig(d_model=16, num_layers=3, num_heads=4, residual="residual", bias=True, positions="none")
    both = shake(build_stack(config, causal=True))
    alone = build_stack(ModelConfig(**{**vars(config), "residual": "post"}), causal=True)
    missing, unexpected = alone.load_state_dict(both.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["final_norm.weight", "final_norm.bias"]
    torch.nn.init.zeros_(both.final_norm.weight)
    torch.nn.init.zeros_(both.final_norm.bias)
    x, positions = torch.randn(2, 5, 16), torch.arange(5)[None]
    assert torch.equal(both(x, positions=positions), alone(x, positions=positions))


@every_placement
def test_there_is_one_final_norm_where_the_equation_has_one(name: str) -> None:
    config = ModelConfig(d_model=16, num_layers=3, num_heads=4, residual=name, norm="rms")
    stack = build_stack(config, causal=True)
    norms = sum(isinstance(module, RMSNorm) for module in stack.modules())
    assert norms == (4 if name == "sandwich" else 2) * 3 + (name != "post")


@every_placement
def test_what_the_stack_hands_out_is_normalised(name: str, shake: Any) -> None:
    config = ModelConfig(d_model=64, num_layers=2, num_heads=4, residual=name, positions="none")
    y = build_stack(config, causal=True)(30 * torch.randn(1, 4, 64), positions=torch.arange(4)[None])
    if name == "residual":  # a sum of two normalised vectors
        assert y.var(-1, correction=0).lt(4.001).all()
    else:
        torch.testing.assert_close(y.var(-1, correction=0), torch.ones(1, 4), rtol=1e-3, atol=1e-3)


@every_placement
def test_dropout_stands_on_the_branch_and_never_on_the_stream(name: str) -> None:
    connection = Residual.named(name)(nn.Identity, 0.5, Place(0, 1, "attention")).train()
    x = torch.ones(1, 1, 4000)
    out = connection(Residual.named(name).open(x), lambda y: y)
    for stream in out if isinstance(out, tuple) else (out,):
        assert set(stream.unique().tolist()) == {1.0, 3.0}
        assert stream.eq(1).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("residual", "positions", "norm", "feedforward"),
    [
        pytest.param(*choices, id="-".join(choices))
        for choices in itertools.product(Residual.registry, PositionScheme.registry, Norm.registry, FEEDFORWARDS)
    ],
)
def test_every_parameter_of_every_combination_is_used_and_every_logit_is_finite(
    residual: str, positions: str, norm: str, feedforward: str
) -> None:
    config = ModelConfig(
        d_model=8,
        num_layers=1,
        num_heads=2,
        d_ff=8,
        context_length=8,
        vocab_size=5,
        residual=residual,
        positions=positions,
        norm=norm,
        feedforward=feedforward,
        bias=True,
        tied_embeddings=False,
    )
    model = DecoderLM(config)
    logits = model(torch.randint(0, 5, (2, 6)))
    assert logits.isfinite().all()
    logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A constant on every key changes no softmax: its gradient is 0, up to rounding.
        assert parameter.grad.any() or name.endswith("key.bias"), name


@pytest.fixture
def sandwich() -> Iterator[type[Residual]]:
    class Sandwich(Residual, name="toy-sandwich"):
        """x ← x + g N(f(N(x))), g growing with depth: a norm of its own, a gain that learns, a place that matters."""

        has_final_norm = True

        def __init__(self, make_norm: Callable[[], nn.Module], dropout: float, place: Place) -> None:
            super().__init__(make_norm, dropout, place)
            self.outer_norm = make_norm()
            self.gain = (1 + place.layer + (place.sublayer == "feedforward") / 2) / place.num_layers

        def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
            return x + self.gain * self.outer_norm(sublayer(self.norm(x)))

    yield Sandwich
    del Residual.registry["toy-sandwich"]


def test_a_new_placement_is_one_class_that_a_config_names(sandwich: type[Residual]) -> None:
    config = ModelConfig(
        d_model=16, num_layers=2, num_heads=2, context_length=16, vocab_size=7, residual="toy-sandwich"
    )
    model = DecoderLM(config)
    gains = [
        [block.attention_residual.gain, block.feedforward_residual.gain]
        for block in model.stack.blocks
        if isinstance(block.attention_residual, sandwich)
    ]
    assert gains == [[0.5, 0.75], [1.0, 1.25]]
    tokens = torch.arange(17).remainder(7)[None]
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        weights = list(model.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.01 * gradient.sign()
    assert losses[-1] < losses[0] / 2
