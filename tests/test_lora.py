"""LoRA: an adapter alone is trained, over a base in full or in 8 bits, and what is merged computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.int8 import Int8Linear, quantise_rows
from minitransformer.models.model import Model, build_in_parts, build_model, count_trained, merged
from minitransformer.settings import with_settings
from tests.runs_for_tests import assert_same_weights

SIZES: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 16, "vocab_size": 11}
KINDS: list[dict[str, Any]] = [
    {},
    {"bias": True, "num_kv_heads": 2, "tied_embeddings": False, "feedforward": "swiglu"},
    {"num_experts": 3, "positions": "learned"},
    {"topology": "encoder", "head": "transformed", "residual": "post"},
    {"topology": "encoder-decoder", "positions": "t5", "embedding_dim": 8},
]
PATTERNS = (".*", r".*(query|value)", r".*blocks\.0\..*")
FORMATS = ("fp32", "int8")


def lora(**choices: Any) -> ModelConfig:
    return with_settings(ModelConfig(), {**SIZES, "adapter": "lora", **choices})


def drawn(config: ModelConfig) -> Model:
    """A model of which no weight is 0 and the adapter matters."""
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype != torch.int8:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for part in int8_parts(model).values():
            stored, scale = quantise_rows(torch.randn(part.weight.shape) / 5)
            part.weight.copy_(stored)
            part.scale.copy_(scale)
    return model


def int8_parts(model: Model) -> dict[str, Int8Linear]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: part for name, part in modules if isinstance(part, Int8Linear)}


def base_weights(model: Model) -> dict[str, torch.Tensor]:
    """The weights of the base of `model`, those in 8 bits as what they stand for."""
    whole = {f"{name}.weight": part.weight * part.scale[:, None] for name, part in int8_parts(model).items()}
    left_out = {f"{name}.scale" for name in int8_parts(model)}
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    return {name: whole.get(name, tensor) for name, tensor in state.items() if name not in left_out}


def in_full(model: Model) -> Model:
    """The adapter of `model`, which is in float64, over its base in float64."""
    twin = build_model(with_settings(model.config, {"lora_base_weights": "fp32"})).double()
    updates = {name: tensor for name, tensor in model.state_dict().items() if ".lora." in name}
    twin.load_state_dict({**base_weights(model), **updates})
    return twin.train(model.training)


def logits(model: Model, *, grad: bool = False) -> torch.Tensor:
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    with torch.set_grad_enabled(grad):
        return model(*inputs)


@given(
    st.sampled_from(KINDS), st.sampled_from(PATTERNS), st.integers(1, 5), st.floats(0.5, 64), st.sampled_from(FORMATS)
)
def test_a_merged_adapter_computes_what_it_computed_unmerged(
    choices: dict[str, Any], pattern: str, rank: int, alpha: float, stored: str
) -> None:
    settings = {"lora_pattern": pattern, "lora_rank": rank, "lora_alpha": alpha, "lora_base_weights": stored}
    model = drawn(lora(**settings, lora_dropout=0.3, **choices)).double()
    unmerged = logits(model)
    base = build_model(model.config.base).double().eval()
    base.load_state_dict(base_weights(model))
    assert (logits(base) - unmerged).abs().max() > 1e-3
    plain = merged(model)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert (logits(plain) - unmerged).abs().max() <= 1e-9 * unmerged.std()
    assert plain.config == model.config.base


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("choices", KINDS, ids=str)
def test_merged_weights_are_rounded_once(choices: dict[str, Any], stored: str) -> None:
    """So that they are exact to 1e-6 of the logits' deviation; float32 computes either model to some 5e-6 of it."""
    torch.manual_seed(1)
    model = drawn(lora(lora_base_weights=stored, **choices))
    plain = merged(model)
    rounded, unmerged = logits(plain), logits(model)
    assert ((rounded - unmerged).square().mean().sqrt() / unmerged.std()).item() < 2e-6
    assert torch.equal(rounded.argmax(-1), unmerged.argmax(-1))
    assert ((logits(plain.double()) - logits(model.double())).abs().max() / unmerged.std()).item() < 1e-6


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("choices", KINDS, ids=str)
def test_an_adapter_that_is_zero_changes_no_bit(choices: dict[str, Any], stored: str) -> None:
    torch.manual_seed(1)
    model = drawn(lora(lora_base_weights=stored, **choices))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.b"):
                parameter.zero_()
    base = build_model(model.config.base)
    base.load_state_dict(base_weights(model))
    assert torch.equal(logits(model), logits(base.eval()))
    assert_same_weights(merged(model).state_dict(), base.state_dict())


# --- over a base in 8 bits


@given(st.sampled_from(KINDS), st.sampled_from(PATTERNS), st.sampled_from([None, ".*bias", ".*norm.*", ".*query.*"]))
def test_over_8_bits_gradients_are_those_over_the_matrices_that_they_stand_for(
    choices: dict[str, Any], pattern: str, also_train: str | None
) -> None:
    if also_train is not None and not choices.get("bias"):
        also_train = ".*query.*"
    model = drawn(lora(lora_pattern=pattern, lora_also_train=also_train, lora_base_weights="int8", **choices)).double()
    twin = in_full(model)
    for each in (model, twin):
        logits(each, grad=True).square().sum().backward()
    expected = {name: weight.grad for name, weight in twin.named_parameters() if weight.requires_grad}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixed", [False, True])
def test_no_matrix_in_8_bits_is_kept_in_full_for_the_backward_pass(mixed: bool) -> None:
    model = drawn(lora(lora_base_weights="int8", d_model=24, d_ff=88)).train()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        logits(model, grad=True)
    matrices = {tuple(part.weight.shape) for part in int8_parts(model).values()}
    kept = [tensor.dtype for tensor in saved if {tuple(tensor.shape), tuple(tensor.shape[::-1])} & matrices]
    assert kept
    assert set(kept) == {torch.int8}


def test_matrices_of_a_base_are_in_8_bits_but_for_heads_embeddings_and_those_that_are_trained() -> None:
    config = lora(
        lora_base_weights="int8", lora_pattern=".*value", lora_also_train=r".*\.query.*", tied_embeddings=False
    )
    parameters = dict(build_model(config).named_parameters())
    wide = {name for name, weight in parameters.items() if weight.dim() == 2 and weight.dtype == torch.float32}
    queries = {f"stack.blocks.{i}.attention.query.weight" for i in (0, 1)}
    assert {name for name in wide if ".lora." not in name} == {"embedding.table.weight", "head.weight", *queries}
    assert {name for name, weight in parameters.items() if weight.requires_grad and ".lora." not in name} == queries


@pytest.mark.parametrize("stored", FORMATS)
def test_a_frozen_weight_counts_two_thirds_of_the_flops(stored: str) -> None:
    config = lora(lora_rank=3, lora_pattern=".*query", lora_base_weights=stored)
    whole, length = build_model(config.base).flops_per_token(8), 8
    scores = 12 * 2 * 16 * length
    updates = 2 * 3 * (16 + 16)
    assert build_model(config).flops_per_token(length) == (whole - scores) * 4 // 6 + 6 * updates + scores


def test_only_the_adapter_is_trained_and_counted() -> None:
    config = lora(lora_pattern=".*query", lora_rank=3)
    trained = {name for name, parameter in build_model(config).named_parameters() if parameter.requires_grad}
    assert trained == {f"stack.blocks.{i}.attention.query.lora.{which}" for i in (0, 1) for which in "ab"}
    assert count_trained(config) == 2 * 3 * (16 + 16)
    assert count_trained(config.base) == build_model(config.base).num_parameters()


def test_other_weights_are_trained_as_well_if_their_names_match() -> None:
    model = build_model(lora(lora_pattern=".*query", lora_also_train=r"stack\.final_norm\..*|head.*", bias=True))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert names
    assert all(name.startswith(("stack.final_norm.", "head")) for name in names)


@pytest.mark.parametrize("choices", KINDS, ids=str)
def test_an_adapted_model_built_in_parts_is_that_built_at_once(choices: dict[str, Any]) -> None:
    states = []
    for build in (build_model, lambda config: build_in_parts(config, lambda module: None)):
        torch.manual_seed(3)
        states.append(list(build(lora(**choices)).named_parameters()))
    for (name, one), (other_name, other) in zip(*states, strict=True):
        assert name == other_name
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (
            {"lora_pattern": "atention.*"},
            ["lora_pattern 'atention.*'", "no linear map", "stack.blocks.0.attention.key"],
        ),
        ({"lora_pattern": "head"}, ["'head'", "no linear map"]),
        ({"lora_pattern": "("}, ["lora_pattern", "'('", "no regular expression"]),
        ({"lora_also_train": "classifier"}, ["lora_also_train 'classifier'", "no weight"]),
        ({"lora_also_train": ".*", "lora_base_weights": "int8"}, ["lora_also_train '.*'", "leave one of them out"]),
        ({"lora_base_weights": "int4"}, ["'int4'", "fp32", "int8"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_in_one_sentence(choices: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_model(lora(**choices))
    assert all(word in str(caught.value) for word in words), str(caught.value)
