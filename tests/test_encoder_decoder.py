"""The encoder-decoder: the laws that every choice of its parts obeys, and its cache beside a memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.block import Memory
from minitransformer.architecture.positions import PositionScheme
from minitransformer.models.config import ModelConfig
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.settings import with_settings
from tests.placements_for_tests import EVERY_PLACEMENT
from tests.texts_for_tests import close, texts, with_another_end, with_padding, without_padding

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 32, "vocab_size": 11}
LENGTH = 6
VARIANTS: list[dict[str, Any]] = [
    *EVERY_PLACEMENT,
    *({"positions": name} for name in PositionScheme.registry),
    {"block": "parallel", "num_kv_heads": 2},
    {"block": "parallel-two-norms", "qk_norm": "full", "norm": "rms"},
    {"attention_window": 3, "window_pattern": (True, False), "attention_kernel": "by-hand"},
    {"num_experts": 3, "feedforward": "swiglu", "attention_softcap": 2.0},
    {"num_decoder_layers": 3, "target_vocab_size": 13, "scaled_embeddings": True, "embedding_norm": True},
]
every_variant = pytest.mark.parametrize("choices", VARIANTS, ids=str)


@pytest.fixture(scope="module")
def tiny(shake: Any) -> Any:
    def make(**choices: Any) -> EncoderDecoder:
        config = with_settings(ModelConfig(), {**SIZES, "topology": "encoder-decoder", **choices})
        return shake(EncoderDecoder(config)).double().eval()

    return make


def step_by_step(model: EncoderDecoder, tokens: Tensor, memory: Memory, cache: Any) -> Tensor:
    return torch.cat([model.hidden_states(token, memory, cache=cache) for token in tokens.split(1, dim=1)], dim=1)


@every_variant
def test_a_future_target_token_never_changes_past_logits(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(1, 5), texts()
    others = with_another_end(inputs, 11)
    [before], after = model(source, inputs), model(source.repeat(len(others), 1), others)
    for changed, logits in enumerate(after, start=1):
        torch.testing.assert_close(logits[:changed], before[:changed], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits[changed], before[changed])


@every_variant
def test_every_source_token_changes_every_logit(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(1, 5), texts()
    others = (source + torch.eye(5, dtype=torch.long)) % 11
    assert (model(others, inputs.repeat(5, 1)) != model(source.repeat(5, 1), inputs.repeat(5, 1))).any(-1).all()


@every_variant
def test_padding_of_the_source_never_matters(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(), texts()
    wide, is_token = with_padding(source, 3, 11)
    logits = model(wide, inputs.repeat(len(wide), 1), source_is_token=is_token)
    close(logits, model(source, inputs).expand_as(logits))


@every_variant
def test_padding_of_the_target_never_matters(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(), texts()
    wide, is_token = with_padding(inputs, 3, 11)
    logits = model(source.repeat(len(wide), 1), wide, is_token=is_token)
    assert logits.isfinite().all()
    found = without_padding(logits, is_token)
    close(found, model(source, inputs).expand_as(found))


@every_variant
def test_texts_of_a_batch_do_not_meet(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(3, 5), texts(3)
    for row, logits in enumerate(model(source, inputs)):
        close(logits, model(source[row : row + 1], inputs[row : row + 1])[0])


@every_variant
def test_padding_sends_no_gradient_that_is_not_a_number(choices: dict[str, Any], tiny: Any) -> None:
    model = tiny(**choices)
    is_token = torch.tensor([[False, False, True, True], [True, True, True, False]])
    logits = model(texts(2, 4), texts(2, 4), source_is_token=is_token.flip(0), is_token=is_token)
    logits[is_token].logsumexp(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# With a cache


@every_variant
def test_cached_equals_uncached(choices: dict[str, Any], tiny: Any) -> None:
    model, tokens = tiny(**choices), texts(2)
    memory = model.encode(texts(2, 5), is_token=torch.arange(5) >= torch.tensor([[0], [2]]))
    expected = model.hidden_states(tokens, memory)
    close(step_by_step(model, tokens, memory, model.new_cache(LENGTH)), expected)
    for split in range(1, LENGTH):
        cache = model.new_cache()
        parts = [model.hidden_states(part, memory, cache=cache) for part in tokens.tensor_split([split], dim=1)]
        close(torch.cat(parts, dim=1), expected)


def test_a_cache_that_outgrows_its_buffers_equals_uncached(tiny: Any) -> None:
    model, tokens = tiny(context_length=80), texts(2, 70)
    memory = model.encode(texts(2, 5))
    close(step_by_step(model, tokens, memory, model.new_cache()), model.hidden_states(tokens, memory))


def test_with_a_cache_the_memory_is_projected_once(tiny: Any) -> None:
    model, projected = tiny(), []
    for block in model.decoder.blocks:
        for linear in (block.cross_attention.key, block.cross_attention.value):
            linear.register_forward_hook(lambda module, inputs, output: projected.append(module))
    step_by_step(model, texts(), model.encode(texts()), model.new_cache())
    assert len(projected) == len(set(projected)) == 4


def test_a_cache_has_a_layer_for_each_of_the_decoder(tiny: Any) -> None:
    cache = tiny(num_decoder_layers=3).new_cache(7)
    assert len(cache.layers) == len(cache.memories) == 3
    assert cache.max_length == 7
    assert tiny().new_cache().max_length == 32


@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [0, 1, 2, 2, 1]], ids=str)
def test_selected_rows_of_a_cache_and_of_a_memory_go_on_as_those_texts(rows: list[int], tiny: Any) -> None:
    model, tokens, chosen = tiny(), texts(3), torch.tensor(rows)
    memory = model.encode(texts(3, 5), is_token=torch.arange(5) < torch.tensor([[5], [3], [2]]))
    cache = model.new_cache()
    step_by_step(model, tokens[:, :4], memory, cache)
    cache.select(chosen)
    after = model.hidden_states(tokens[chosen, 4:], memory.select(chosen), cache=cache)
    close(after, model.hidden_states(tokens, memory)[chosen, 4:])


def test_reordered_beams_go_on_as_each_other_beside_the_same_memory(tiny: Any) -> None:
    model, tokens, rows = tiny(), texts(4), torch.tensor([1, 0, 3, 3])
    memory = model.encode(texts(2, 5)).select(torch.tensor([0, 0, 1, 1]))
    cache = model.new_cache()
    step_by_step(model, tokens[:, :4], memory, cache)
    cache.reorder(rows)
    close(
        model.hidden_states(tokens[rows, 4:], memory, cache=cache),
        model.hidden_states(tokens[rows], memory)[:, 4:],
    )


def test_a_memory_selects_its_values_and_its_padding() -> None:
    values, is_token, rows = torch.randn(3, 4, 2), torch.rand(3, 4) < 0.5, torch.tensor([2, 0])
    chosen = Memory(values, is_token).select(rows)
    assert torch.equal(chosen.values, values[rows])
    assert chosen.is_token is not None
    assert torch.equal(chosen.is_token, is_token[rows])
    assert Memory(values).select(rows).is_token is None


# Embeddings


def test_one_vocabulary_has_one_table_for_source_target_and_head(tiny: Any) -> None:
    model = tiny()
    assert model.target_embedding is model.embedding
    assert model.head.weight is model.embedding.table.weight


@pytest.mark.parametrize("choices", [{"shared_embeddings": False}, {"target_vocab_size": 13}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_separate_tables_share_nothing_and_the_head_is_tied_to_the_target(
    choices: dict[str, Any], tied: bool, tiny: Any
) -> None:
    model = tiny(**choices, tied_embeddings=tied)
    source, target = model.embedding.table.weight, model.target_embedding.table.weight
    assert source.data_ptr() != target.data_ptr()
    assert (model.head.weight is target) == tied
    assert source.shape == (11, 16)
    assert target.shape == (choices.get("target_vocab_size", 11), 16)
    assert model(texts(), texts()).size(-1) == len(target)


def test_the_decoder_has_as_many_blocks_as_asked_for(tiny: Any) -> None:
    model = tiny(num_decoder_layers=3)
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (2, 3)
    assert all(block.cross_attention is None for block in model.encoder.blocks)


def test_logits_are_the_head_of_the_hidden_states(tiny: Any) -> None:
    model, source, inputs = tiny(), texts(2), texts(2)
    assert torch.equal(model(source, inputs), model.head(model.hidden_states(inputs, model.encode(source))))
