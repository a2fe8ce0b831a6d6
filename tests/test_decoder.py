"""The decoder: the laws that every choice of its parts obeys, and its counts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minitransformer.architecture.positions import PositionScheme
from minitransformer.errors import UserError
from minitransformer.models.config import PRESETS, ModelConfig
from minitransformer.models.model import build_model, count_parameters
from tests.placements_for_tests import EVERY_PLACEMENT
from tests.texts_for_tests import with_another_end, with_padding, without_padding

VARIANTS: list[dict[str, Any]] = [
    *(
        {**placement, "positions": positions}
        for placement, positions in itertools.product(EVERY_PLACEMENT, PositionScheme.registry)
    ),
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "attention_kernel": "by-hand"},
    {"attention_window": 3},
    {"qk_norm": "head", "norm": "rms", "feedforward": "swiglu"},
    {"token_smear": True},
]
every_variant = pytest.mark.parametrize("choices", VARIANTS, ids=str)


@every_variant
def test_a_future_token_never_changes_past_logits(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (1, 9))
    [before], after = model(tokens), model(with_another_end(tokens, 11))
    for changed, logits in enumerate(after, start=1):
        torch.testing.assert_close(logits[:changed], before[:changed], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits[changed], before[changed])


@every_variant
def test_padding_never_matters(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (1, 6))
    padded, is_token = with_padding(tokens, 4, 11)
    logits = model(padded, is_token=is_token)
    assert logits.isfinite().all()
    found = without_padding(logits, is_token)
    torch.testing.assert_close(found, model(tokens).expand_as(found), rtol=1e-9, atol=1e-9)


@every_variant
def test_sequences_of_a_batch_do_not_meet(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (3, 6))
    for logits, alone in zip(model(tokens), tokens.split(1), strict=True):
        torch.testing.assert_close(model(alone)[0], logits, rtol=1e-9, atol=1e-9)


@every_variant
def test_padding_sends_no_gradient_that_is_not_a_number(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model = tiny_decoder(**choices)
    is_token = torch.tensor([[False, False, True, True], [True, True, True, False]])
    model(torch.randint(0, 11, (2, 4)), is_token=is_token)[is_token].logsumexp(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_evaluation_is_deterministic_and_training_drops(tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(dropout=0.3), torch.randint(0, 11, (2, 6))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_logits_are_the_head_of_the_hidden_states(tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(), torch.randint(0, 11, (2, 6))
    assert torch.equal(model(tokens), model.head(model.hidden_states(tokens)))
    assert model(tokens).shape == (2, 6, 11)


def test_the_stack_reads_scaled_embeddings(tiny_decoder: Any) -> None:
    plain, scaled = tiny_decoder(), tiny_decoder(scaled_embeddings=True)
    tokens = torch.tensor([[3, 1]])
    assert torch.equal(plain.embedding(tokens), plain.embedding.table.weight[tokens])
    torch.testing.assert_close(scaled.embedding(tokens), 4 * scaled.embedding.table.weight[tokens])


def test_tied_embeddings_are_one_parameter_and_stay_one(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 8, "num_heads": 2, "num_layers": 1, "context_length": 8, "vocab_size": 7}
    tied, untied = build_model(ModelConfig(**sizes)), build_model(ModelConfig(**sizes, tied_embeddings=False))
    assert tied.head.weight is tied.embedding.table.weight
    assert untied.head.weight is not untied.embedding.table.weight
    assert untied.num_parameters() == tied.num_parameters() + 7 * 8
    tied.double()
    tied.load_state_dict(tied.state_dict())
    assert tied.head.weight is tied.embedding.table.weight


@every_variant
def test_a_state_dict_makes_the_same_model_again(choices: dict[str, Any], tiny_decoder: Any, tmp_path: Path) -> None:
    model, other = tiny_decoder(**choices), tiny_decoder(**choices)
    tokens = torch.randint(0, 11, (2, 6))
    assert not torch.equal(other(tokens), model(tokens))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(tokens), model(tokens))


def test_the_state_dict_holds_parameters_alone() -> None:
    for positions in PositionScheme.registry:
        with torch.device("meta"):
            model = build_model(ModelConfig(positions=positions, vocab_size=7, tied_embeddings=False))
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_gpt2_has_as_many_parameters_as_the_published_one() -> None:
    assert count_parameters(PRESETS["gpt2-124m"]) == 124_439_808


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.topology == "decoder"])
def test_parameters_counted_without_weights_are_those_of_the_formula_and_of_the_model(name: str) -> None:
    config = ModelConfig(**{**vars(PRESETS[name]), "vocab_size": 300})
    d, vocabulary, bias = config.d_model, 300, int(config.bias)
    d_ff = config.d_ff or 4 * d
    outputs = 2 * d + 2 * (config.num_kv_heads or config.num_heads) * config.features_per_head  # of all heads
    linears = outputs * (d + bias) + 2 * d * d_ff + bias * (d_ff + d)
    norms = (2 * config.num_layers + 1) * (d + bias * d)
    norms += (config.qk_norm == "head") * config.num_layers * 2 * config.features_per_head
    tables = vocabulary * d * (1 if config.tied_embeddings else 2)
    table = config.context_length * d if config.positions.name == "learned" else 0
    smear = d if config.token_smear else 0
    assert count_parameters(config) == tables + table + smear + config.num_layers * linears + norms
    if name != "gpt2-124m":
        model = build_model(config)
        assert count_parameters(config) == model.num_parameters()
        assert model.num_parameters() == sum(weight.numel() for weight in set(model.parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_for_each_weight_of_a_product_and_those_of_the_scores(tied: bool) -> None:
    config = ModelConfig(
        d_model=8, num_layers=3, num_heads=2, d_ff=20, context_length=16, vocab_size=7, tied_embeddings=tied, bias=True
    )
    length = 10
    weights = 3 * (4 * 8 * 8 + 2 * 8 * 20) + 7 * 8  # the head multiplies, tied or not; the embedding looks up
    scores_and_sums = 2 * 2 * (2 * 4 * length)  # Q Kᵀ and its product with V, 2 heads of 4 features, 2 flops each
    assert build_model(config).flops_per_token(length) == 6 * weights + 3 * 3 * scores_and_sums


def test_a_model_without_a_vocabulary_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="vocab_size is not set: give"):
        build_model(ModelConfig())


def test_a_fresh_model_finds_all_tokens_about_equally_likely() -> None:
    model = build_model(ModelConfig(vocab_size=50))
    tokens = torch.randint(0, 50, (4, 32))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), torch.randint(0, 50, (128,)))
    assert loss.item() == pytest.approx(math.log(50), abs=0.3)
