"""Module surgery: replaced linear maps train, save and load like any module, and the model they came from stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.linear import OutputProjection
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from minitransformer.models.surgery import copied, replaced

MakeDecoder = Callable[..., DecoderLM]
EVERY_ATTENTION = r".*attention\.(query|value)"


class Adapted(nn.Module):
    """x Wᵀ + b + x Aᵀ Bᵀ, where A and B alone are trained. Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, dtype=linear.weight.dtype))
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Negated(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", -linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


TOKENS = torch.tensor([[1, 2, 3, 4]])


def test_what_matches_is_replaced_and_all_else_is_shared(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    before = dict(model.named_modules())
    adapted = replaced(model, EVERY_ATTENTION, Adapted)
    assert [name for name, module in adapted.named_modules() if isinstance(module, Adapted)] == [
        f"stack.blocks.{layer}.attention.{name}" for layer in (0, 1) for name in ("query", "value")
    ]
    assert dict(model.named_modules()) == before
    kept = dict(adapted.named_parameters())
    assert all(kept[name.replace("query.w", "query.base.w").replace("value.w", "value.base.w")] is weight
               for name, weight in model.named_parameters())  # fmt: skip
    assert adapted.head.weight is adapted.embedding.table.weight
    torch.testing.assert_close(adapted(TOKENS), model(TOKENS))


def test_replaced_maps_train_save_and_load_like_any_module(tiny_decoder: MakeDecoder) -> None:
    model = tiny_decoder()
    adapted = replaced(model, EVERY_ATTENTION, Adapted)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(adapted(TOKENS)[0, :-1], TOKENS[0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(weight.grad is not None for name, weight in adapted.named_parameters() if "up" in name)
    other = replaced(tiny_decoder(), EVERY_ATTENTION, Adapted)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(TOKENS), adapted(TOKENS))


@pytest.mark.parametrize("choices", [{}, {"logit_scale": 0.5, "logit_softcap": 3.0}], ids=str)
def test_a_head_keeps_what_it_does_around_its_product(tiny_decoder: MakeDecoder, choices: dict[str, object]) -> None:
    model = tiny_decoder(**choices)
    negated = replaced(model, "head", Negated)
    assert list(negated.state_dict())[-1] == "head.product.weight"
    torch.testing.assert_close(negated(TOKENS), -model(TOKENS))


@pytest.mark.parametrize(
    "choices",
    [{"topology": "encoder"}, {"topology": "encoder-decoder"}, {"topology": "rnn"}, {"num_experts": 3}],
    ids=str,
)
def test_every_linear_map_of_every_topology_can_be_replaced(choices: dict[str, object]) -> None:
    model = build_model(ModelConfig(d_model=16, num_heads=2, num_layers=1, vocab_size=11, **choices))  # type: ignore[arg-type]
    adapted = replaced(model, ".*", Adapted)
    assert not [
        module for module in adapted.modules() if isinstance(module, Adapted) and not module.base.weight.numel()
    ]
    inside = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert sum(isinstance(module, Adapted) for module in adapted.modules()) == inside


def test_a_map_that_does_something_else_is_no_linear_map() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 3), OutputProjection(3, 3))
    assert [type(module) for module in replaced(model, ".*", Negated)] == [Doubled, Negated]


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_there_are(tiny_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match=r"no linear map of the model matches 'q_proj': .* stack.blocks.0.attention.q"):
        replaced(tiny_decoder(), "q_proj", Adapted)


def test_a_module_with_two_names_stays_one_and_hooks_of_a_copy_are_its_own() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    copy = copied(model, lambda name, module: None)
    assert copy["first"] is copy["second"][0] is not shared
    copy["first"].register_forward_hook(lambda module, args, output: output)
    copy["first"].register_buffer("extra", torch.ones(1))
    assert not shared._forward_hooks
    assert list(shared.state_dict()) == ["weight", "bias"]
