"""Residual placements: each against its recurrence written out in float64, and a new one from outside the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.attention import identity
from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.norms import LayerNorm, Norm, RMSNorm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Place, PostLN, PreLN, ResiDual, Residual
from minitransformer.errors import UserError
from minitransformer.lab.stated import STATEMENTS
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from tests.late_for_tests import late
from tests.placements_for_tests import OURS, SUBLAYERS, Connections, Function, by_hand, choosing, nudged


class Recurrence(Protocol):
    """The output for x, from sublayers f_k, the norms in the order of their use, and the last norm where there is one.

    Sublayers alternate between attention and the feed-forward network. Of several last norms, `final` is the list.
    """

    def __call__(
        self, x: Tensor, f: list[Function], norms: list[Function], final: Any, gains: list[Tensor]
    ) -> Tensor: ...


def post(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for k in range(len(f)):
        x = norms[k](x + f[k](x))
    return x


def pre(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    return final(x + sum(branches(x, f, lambda k, y: norms[k](y))))


def pre_scaled(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    return pre(x, [lambda y, k=k: 0.22 * f[k](y) for k in range(len(f))], norms, final, gains)


def branches(x: Tensor, f: list[Function], read: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """f_k(read_k(x + all branches before k))."""
    found: list[Tensor] = []
    for k in range(len(f)):
        found.append(f[k](read(k, x + sum(found))))
    return found


def sandwich(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    outer = [lambda y, k=k: norms[2 * k + 1](f[k](y)) for k in range(len(f))]
    return final(x + sum(branches(x, outer, lambda k, y: norms[2 * k](y))))


def olmo2(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    outer = [lambda y, k=k: norms[k](f[k](y)) for k in range(len(f))]
    return final(x + sum(branches(x, outer, lambda k, y: y)))


def none(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    return x + sum(branches(x, f, lambda k, y: y))


def deepnorm(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for k in range(len(f)):
        x = norms[k](len(f) ** 0.25 * x + f[k](x))  # 2L sublayers
    return x


def admin(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for k in range(len(f)):
        x = norms[k](torch.diag_embed(x) @ gains[k] + f[k](x))
    return x


def keel(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for k in range(len(f)):
        x = norms[2 * k + 1](len(f) * x + f[k](norms[2 * k](x)))
    return x


def lns(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    return final(x + sum(branches(x, f, lambda k, y: norms[k](y) / math.sqrt(1 + k // 2))))


def mix(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    first = len(f) // 4
    return pre(post(x, f[:first], norms[:first], None, []), f[first:], norms[first:], final, [])


def hybrid(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for layer in range(len(f) // 2):
        y = norms[layer](x + f[2 * layer](x))
        x = y + f[2 * layer + 1](y)
    return final(x)


def hybrid_star(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    x = x + sum(branches(x, f[:2], lambda k, y: norms[k](y)))
    return hybrid(x, f[2:], norms[2:], final, [])


def b2t(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    for layer in range(len(f) // 2):
        y = norms[2 * layer](x + f[2 * layer](x))
        x = norms[2 * layer + 1](x + y + f[2 * layer + 1](y))
    return x


def residual(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    """The output as a sum over branches, rather than as a second stream."""
    found = [x]
    for k in range(len(f)):
        found.append(f[k](x))
        x = norms[k](x + found[-1])
    return x + final(torch.stack(found).sum(0))


def residual_scaled(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    return residual(x, f, norms, lambda y: final(y * 0.05), gains)


def siamese(x, f, norms, final, gains):  # type: ignore[no-untyped-def]
    """As the authors' block for DeiT: three norms a sublayer, and c = √(2 (index + 1))."""
    y = x
    for k in range(len(f)):
        c = ((k // 2 + 1) * 2) ** 0.5
        x = norms[3 * k](x)
        z = f[k](norms[3 * k + 2](x + norms[3 * k + 1](y)))
        x, y = x + z / c, y + z
    return final[2](final[0](x) + final[1](y))


RECURRENCES: dict[str, Recurrence] = {
    "post": post,
    "pre": pre,
    "pre-scaled": pre_scaled,
    "sandwich": sandwich,
    "peri": sandwich,
    "olmo2": olmo2,
    "none": none,
    "deepnorm": deepnorm,
    "admin": admin,
    "lns": lns,
    "keel": keel,
    "mix": mix,
    "hybrid": hybrid,
    "hybrid-star": hybrid_star,
    "b2t": b2t,
    "residual": residual,
    "residual-scaled": residual_scaled,
    "siamese": siamese,
}
WITHOUT_FINAL_NORM = {"post", "none", "deepnorm", "admin", "keel", "b2t"}
NORMS_A_SUBLAYER = {"sandwich": 2, "peri": 2, "keel": 2, "siamese": 3}
every_placement = pytest.mark.parametrize("name", Residual.registry)


def test_every_placement_of_the_package_has_its_recurrence_here_or_a_second_statement() -> None:
    assert set(OURS) <= set(RECURRENCES) | set(STATEMENTS)


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_placement_is_its_recurrence_in_values_and_gradients(name: str, shake: Any) -> None:
    connections = shake(Connections(name)).double()
    x = torch.randn(2, 3, 6).double().requires_grad_()
    final = [by_hand(norm) for norm in connections.final_norm.modules() if isinstance(norm, LayerNorm)]
    norms = [by_hand(norm) for norm in connections.residuals.modules() if isinstance(norm, LayerNorm)]
    gains = [part for key, part in connections.residuals.named_parameters() if key.endswith("omega")]
    f: list[Function] = [lambda y, linear=linear: linear(y).tanh() for linear in connections.sublayers]  # type: ignore[misc]
    actual = connections(x)
    expected = RECURRENCES[name](x, f, norms, final if len(final) > 1 else next(iter(final), None), gains)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *connections.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual.sin().sum(), leaves),
        torch.autograd.grad(expected.sin().sum(), leaves),
        rtol=1e-12,
        atol=1e-12,
    )


def test_one_step_of_some_placements_by_numbers() -> None:
    """With N(x) = 10 x and f(x) = x + 1, from x = 2 and, for ResiDual, y = 3."""

    class Tenfold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * x

    def one(placement: type[Residual], stream: Any) -> Any:
        return placement.choose().make(Tenfold, 0.0, Place(0, 1, "attention", d_model=1))(stream, lambda x: x + 1)

    x, y = torch.tensor(2.0), torch.tensor(3.0)
    assert one(PostLN, x) == 50
    assert one(PreLN, x) == 23
    assert one(ResiDual, (x, y)) == (50, 6)
    assert ResiDual.Shared(ResiDual.Settings(), []).close((x, y), Tenfold()) == 32
    assert PreLN.Shared(PreLN.Settings(), []).close(x, Tenfold()) == 20


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
    config = ModelConfig(d_model=16, num_layers=4, num_heads=4, residual=name, norm="rms")
    stack = build_stack(config, causal=True)
    final = [module for module in stack.final_norm.modules() if isinstance(module, RMSNorm)]
    assert bool(final) == Residual.named(name).has_final_norm
    assert isinstance(stack.embedding_norm, RMSNorm) == Residual.named(name).has_embedding_norm
    if name not in RECURRENCES:
        return
    assert len(final) == (0 if name in WITHOUT_FINAL_NORM else 3 if name == "siamese" else 1)
    assert isinstance(stack.embedding_norm, RMSNorm if name == "peri" else nn.Identity)
    norms = [
        sum(isinstance(module, RMSNorm) for module in connection.modules())
        for block in stack.blocks
        for connection in (block.attention_residual, block.feedforward_residual)
    ]
    assert norms == {
        "none": [0] * 8,
        "hybrid": [0, 1] * 4,
        "hybrid-star": [1, 1, 0, 1, 0, 1, 0, 1],
    }.get(name, [NORMS_A_SUBLAYER.get(name, 1)] * 8)


@pytest.mark.parametrize("name", sorted(set(OURS) - {"none"}))
def test_what_the_stack_hands_out_is_normalised(name: str, shake: Any) -> None:
    config = ModelConfig(d_model=64, num_layers=4, num_heads=4, residual=name, positions="none")
    y = build_stack(config, causal=True)(30 * torch.randn(1, 4, 64), positions=torch.arange(4)[None])
    if issubclass(Residual.named(name), ResiDual):  # a sum of two normalised vectors
        assert y.var(-1, correction=0).lt(4.001).all()
    else:
        torch.testing.assert_close(y.var(-1, correction=0), torch.ones(1, 4), rtol=1e-3, atol=1e-3)


class Weighed(nn.Module):
    """No norm, with the weight that norms have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4000))

    def forward(self, x: Tensor) -> Tensor:
        return x


@every_placement
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_dropout_changes_what_a_sublayer_adds_and_nothing_where_that_is_0(name: str, sublayer: str, shake: Any) -> None:
    connections = late(Connections(name, features=64, dropout=0.5))
    connection = connections.residuals[SUBLAYERS.index(sublayer)]
    stream, branch = connections.shared.open(torch.randn(2, 3, 64)), torch.randn(2, 3, 64)

    def after(f: Function, training: bool) -> Tensor:
        stream_after = connection.train(training)(stream, lambda x, mix_values=identity: mix_values(f(x)))
        return connections.shared.state(stream_after)

    assert torch.equal(after(torch.zeros_like, True), after(torch.zeros_like, False))
    shake(connections)  # a placement may start without its branches
    assert not torch.equal(after(lambda x: branch, True), after(lambda x: branch, False))


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_dropout_stands_on_the_branch_and_never_on_the_stream(name: str, sublayer: str) -> None:
    place = Place(0, 4, sublayer, d_model=4000)
    chosen = Residual.choose(name)
    connection, shared = chosen.make(Weighed, 0.5, place).eval(), chosen.variant.Shared(chosen.settings, [place])
    stream = shared.open(torch.ones(1, 1, 4000))

    def after(f: Function) -> Tensor:
        return shared.state(connection(stream, f))

    whole, without = after(torch.ones_like).unique().item(), after(torch.zeros_like).unique().item()
    connection.train()
    dropped = after(torch.ones_like)
    kept = without + 2 * (whole - without)  # what is left is twice as large
    torch.testing.assert_close(dropped.unique(), torch.tensor(sorted([without, kept])))
    assert dropped.isclose(torch.tensor(without)).float().mean().item() == pytest.approx(0.5, abs=0.05)


PARTS = [
    *({"positions": name} for name in PositionScheme.registry),
    *({"norm": name} for name in Norm.registry),
    *({"feedforward": name} for name in FeedForward.registry),
    *({"block": name} for name in Block.registry),
]


@every_placement
@pytest.mark.parametrize("choice", PARTS, ids=lambda choice: "-".join(choice.values()))
def test_every_parameter_of_every_combination_is_used_and_every_logit_is_finite(
    name: str, choice: dict[str, str]
) -> None:
    sizes: dict[str, Any] = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "context_length": 8}
    others: dict[str, Any] = {"vocab_size": 5, "bias": True, "tied_embeddings": False}
    try:
        config = ModelConfig(**{**sizes, **others, **choosing(name), **choice})
    except UserError as refusal:
        pytest.skip(f"refused, see the tests of configurations: {refusal}")
    model, tokens = build_model(config), torch.randint(0, 5, (2, 6))
    assert model(tokens).isfinite().all()
    nudged(model)(tokens).logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # A constant on every key changes no softmax: its gradient is 0, up to rounding.
        assert parameter.grad.any() or parameter_name.endswith(("key.bias", "key_norm.bias")), parameter_name


@pytest.fixture
def sandwich() -> Iterator[type[Residual]]:
    class Sandwich(Residual, name="toy-sandwich"):
        """x ← x + g N(f(N(x))), g growing with depth: a norm of its own, a gain that learns, a place that matters."""

        has_final_norm = True

        def __init__(self, settings: Any, make_norm: Callable[[], nn.Module], dropout: float, place: Place) -> None:
            super().__init__(settings, make_norm, dropout, place)
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
    model = build_model(config)
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


@pytest.mark.parametrize("topology", ["decoder", "encoder", "encoder-decoder"])
@every_placement
def test_calibration_changes_only_admin_among_ours(name: str, topology: str) -> None:
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 4, "num_heads": 4, "vocab_size": 7, "dropout": 0.5}
    model = build_model(ModelConfig(topology=topology, residual=name, init="xavier", **sizes)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.arange(7)[None]
    model.calibrate(lambda: model(*[tokens] * (2 if topology == "encoder-decoder" else 1)))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    first = [connection for connection in before if "blocks.0.attention_residual.omega" in connection]
    if name in OURS:
        assert changed == {key for key in before if key.endswith("omega")} - set(first)
        assert bool(changed) == (name == "admin")
    assert model.training


@every_placement
def test_a_placement_reads_a_text_from_the_cache_as_it_does_at_once(name: str, tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(residual=name, num_layers=5), torch.randint(0, 11, (2, 9))
    cache = model.new_cache()
    parts = [model(part, cache=cache) for part in tokens.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))
