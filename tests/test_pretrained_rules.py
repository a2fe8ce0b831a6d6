"""Tables of rules: every transform comes back, and whatever stands against a bijection is reported together."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.positions import Rotary
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.rules import (
    SAME,
    GroupedHeads,
    InterleavedPairs,
    Reversed,
    Row,
    Rule,
    Transform,
    Transposed,
    TransposedThirds,
    WithoutFirst,
    load_weights,
    save_weights,
)
from minitransformer.settings import with_settings

CONFIG = ModelConfig(
    d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=5, positions=Rotary.choose(fraction=0.5)
)
SIZES = st.integers(1, 5)


@st.composite
def shapes_in_files(draw: st.DrawFn, transform: Transform) -> tuple[list[int], dict[str, Any]]:
    """The shape of a tensor of a file, a matrix or a vector, and the choices of a configuration that it fits."""
    groups, queries, head_dim, width = draw(SIZES), draw(SIZES), 2 * draw(SIZES), draw(SIZES)
    turned = draw(st.integers(1, head_dim // 2)) * 2
    sizes = {
        "d_model": head_dim * groups * queries,
        "num_heads": groups * queries,
        "num_kv_heads": groups,
        "head_dim": head_dim,
        "rotary_fraction": 1.0 if turned == head_dim else math.nextafter(turned / head_dim, 1.0),
    }
    is_matrix = draw(st.booleans())
    match transform:
        case TransposedThirds():
            shape = [width, 3 * head_dim][not is_matrix :]
        case GroupedHeads():
            shape = [groups * (queries + 2) * head_dim, width][: 1 + is_matrix]
        case InterleavedPairs():
            shape = [groups * queries * head_dim, width][: 1 + is_matrix]
        case Row():
            shape = [1, width]
        case _:
            shape = [head_dim, width][: 1 + is_matrix]
    return shape, sizes


# Each transform, and how many weights a tensor becomes.
TRANSFORMS: dict[Transform, int] = {
    SAME: 1,
    Transposed(): 1,
    TransposedThirds(): 3,
    GroupedHeads(): 3,
    InterleavedPairs(): 1,
    Row(): 1,
    Reversed(): 1,
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
@given(data=st.data())
def test_what_is_loaded_is_saved_as_it_was(transform: Transform, data: st.DataObject) -> None:
    shape, sizes = data.draw(shapes_in_files(transform))
    tensor, config = torch.randn(shape), with_settings(ModelConfig(), sizes)
    weights = transform.load(tensor, config)
    assert len(weights) == TRANSFORMS[transform]
    assert sum(weight.numel() for weight in weights) == tensor.numel()
    assert torch.equal(transform.save(weights, config), tensor)


def test_rows_that_stand_for_no_position_come_back_as_zeros() -> None:
    table = torch.randn(6, 3)
    (kept,) = WithoutFirst(2).load(table, CONFIG)
    assert torch.equal(kept, table[2:])
    assert torch.equal(WithoutFirst(2).save((kept,), CONFIG), torch.cat([torch.zeros(2, 3), table[2:]]))


@given(st.integers(0, 4), st.integers(1, 6))
def test_positions_come_back_behind_any_number_of_rows(rows: int, positions: int) -> None:
    (kept,) = WithoutFirst(rows).load(WithoutFirst(rows).save((table := torch.randn(positions, 3),), CONFIG), CONFIG)
    assert torch.equal(kept, table)


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_grouped_heads_are_the_query_heads_of_a_group_then_its_key_then_its_value(
    groups: int, queries: int, head_dim: int
) -> None:
    config = ModelConfig(num_heads=groups * queries, num_kv_heads=groups, head_dim=head_dim)
    names = [f"{g}{kind}" for g in range(groups) for kind in [*(f"q{i}" for i in range(queries)), "k", "v"]]
    numbers = torch.arange(len(names)).repeat_interleave(head_dim)
    for part, kind in zip(GroupedHeads().load(numbers, config), "qkv", strict=True):
        heads = part.view(-1, head_dim)
        assert torch.equal(heads, heads[:, :1].expand_as(heads))
        assert [names[i] for i in heads[:, 0]] == [name for name in names if kind in name]


def test_interleaved_pairs_become_halves_of_what_is_turned_and_the_rest_stays() -> None:
    config = ModelConfig(d_model=16, num_heads=2, positions=Rotary.choose(fraction=0.5))
    (rows,) = InterleavedPairs().load(torch.arange(16), config)
    assert rows.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


class Small(nn.Module):
    """An embedding, two layers without biases, and a head that is tied to the embedding or not."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.head = nn.Linear(8, 5)
        if tied:
            self.head.weight = self.table.weight


RULES = (
    Rule("wte", "table"),
    Rule("h.{layer}.fc", "layers.{layer}", Transposed()),
    Rule("logits_bias", "head.bias", Row(), tensors=True, optional=True),
    Rule("lm_head", "head"),
    Rule("nothing", "no.such.module"),
)
IGNORED = (r"\.mask$",)


def tensors(**others: Tensor | None) -> dict[str, Tensor]:
    named = {"wte.weight": torch.randn(5, 8), **{f"h.{i}.fc.weight": torch.randn(8, 8) for i in range(2)}}
    named["logits_bias"] = torch.randn(1, 5)
    named |= {name.replace("__", "."): tensor for name, tensor in others.items()}  # type: ignore[misc]
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def load(model: nn.Module, file: dict[str, Tensor]) -> None:
    load_weights(model, CONFIG, file, RULES, IGNORED)


def test_every_weight_is_filled_from_its_tensor_and_saved_under_its_name() -> None:
    model, file = Small(), tensors()
    load(model, file)
    assert torch.equal(model.layers[1].weight, file["h.1.fc.weight"].T)
    saved = save_weights(model, CONFIG, RULES)
    assert saved.keys() == file.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in file.items())


def test_an_untied_head_is_a_tensor_of_its_own() -> None:
    model, file = Small(tied=False), tensors(lm_head__weight=torch.randn(5, 8))
    load(model, file)
    assert torch.equal(model.head.weight, file["lm_head.weight"])
    assert save_weights(model, CONFIG, RULES).keys() == file.keys()


def test_a_copy_of_a_tied_tensor_may_be_there_if_it_is_the_same() -> None:
    file = tensors()
    load(Small(), {**file, "lm_head.weight": file["wte.weight"]})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the weight that it is tied to"):
        load(Small(), {**file, "lm_head.weight": file["wte.weight"] + 1})


def test_an_optional_tensor_that_is_absent_means_zeros() -> None:
    model = Small()
    nn.init.ones_(model.head.bias)
    load(model, tensors(logits_bias=None))
    assert not model.head.bias.any()


def test_half_precision_becomes_that_of_the_model() -> None:
    model, file = Small(), {name: tensor.bfloat16() for name, tensor in tensors().items()}
    load(model, {**file, "lm_head.weight": file["wte.weight"]})
    assert model.table.weight.dtype == torch.float32
    assert torch.equal(model.table.weight, file["wte.weight"].float())


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"wte__weight": None}, "wte.weight is missing"),
    ({"extra__weight": torch.ones(1)}, "extra.weight is not expected"),
    ({"wte__weight": torch.ones(6, 8)}, "wte.weight has the shape [6, 8] where [5, 8] is needed"),
    ({"h__0__fc__bias": torch.ones(8)}, "h.0.fc.bias is not expected"),
    ({"h__1__fc__weight": torch.ones(8, 4)}, "h.1.fc.weight has the shape [4, 8] where [8, 8] is needed"),
]


@pytest.mark.parametrize(("others", "message"), PROBLEMS, ids=[message for _, message in PROBLEMS])
def test_what_stands_against_a_bijection_is_said(others: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(Small(), tensors(**others))


def test_all_that_is_wrong_is_reported_together_and_once_for_all_layers() -> None:
    both = {f"h__{i}__fc__weight": None for i in range(2)}
    with pytest.raises(UserError) as caught:
        load(Small(), tensors(**both, extra=torch.ones(1), wte__weight=torch.ones(2, 8)))
    assert str(caught.value) == (
        "the tensors do not fit config.json (wte.weight has the shape [2, 8] where [5, 8] is needed; "
        "h.0.fc.weight is missing (and 1 more like it); extra is not expected): "
        "check that both are of the same model"
    )


def test_a_weight_that_no_rule_fills_is_reported_in_both_directions() -> None:
    with pytest.raises(UserError, match=r"nothing fills layers\.0\.weight \(and 1 more like it\)"):
        load_weights(Small(), CONFIG, {"wte.weight": torch.ones(5, 8)}, [RULES[0], RULES[2]], [])
    with pytest.raises(UserError, match=r"no place for layers\.0\.weight, layers\.1\.weight"):
        save_weights(Small(), CONFIG, [RULES[0], RULES[2]])


def test_a_tensor_that_cannot_be_divided_is_reported() -> None:
    fused = Rule("qkv", ("layers.0", "layers.1", "head"), TransposedThirds())
    for shape in ([8, 7], []):
        with pytest.raises(UserError, match=re.escape(f"qkv.weight has the shape {shape}, which does not divide into")):
            load_weights(Small(), CONFIG, {"qkv.weight": torch.ones(shape)}, [fused], [])


def test_what_is_declared_as_ignored_may_be_left_over() -> None:
    load(Small(), tensors(h__0__mask=torch.ones(3)))
