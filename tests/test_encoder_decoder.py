"""Encoder-decoders, the recurrent one too: laws that every choice of their parts obeys, and a cache beside a memory."""

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.block import Memory
from minitransformer.architecture.positions import PositionScheme
from minitransformer.models.model import Model
from tests.placements_for_tests import EVERY_PLACEMENT
from tests.texts_for_tests import close, texts, with_another_end, with_padding, without_padding

LENGTH = 6
TRANSFORMERS = [
    *EVERY_PLACEMENT,
    *({"positions": name} for name in PositionScheme.registry),
    {"block": "parallel", "num_kv_heads": 2},
    {"block": "parallel-two-norms", "qk_norm": "full", "norm": "rms"},
    {"attention_window": 3, "window_pattern": (True, False), "attention_kernel": "by-hand"},
    {"num_experts": 3, "feedforward": "swiglu", "attention_softcap": 2.0},
    {"num_decoder_layers": 3, "target_vocab_size": 13, "scaled_embeddings": True, "embedding_norm": True},
]
RECURRENT = [
    {"num_layers": 1},
    {"num_decoder_layers": 3},
    {"num_layers": 1, "target_vocab_size": 13, "scaled_embeddings": True, "tied_embeddings": False},
    {"num_layers": 1, "shared_embeddings": False, "dropout": 0.5},
]
VARIANTS = [("encoder-decoder", choices) for choices in TRANSFORMERS] + [("rnn", choices) for choices in RECURRENT]
every_variant = pytest.mark.parametrize(("topology", "choices"), VARIANTS, ids=str)
both_topologies = pytest.mark.parametrize("topology", ["encoder-decoder", "rnn"])


def token_by_token(model: Model, tokens: Tensor, memory: Memory, cache) -> Tensor:
    return torch.cat([model.hidden_states(token, memory, cache=cache) for token in tokens.split(1, dim=1)], dim=1)


@every_variant
def test_a_future_target_token_never_changes_past_logits(topology, choices, tiny_model):
    model, source, inputs = tiny_model(topology, **choices), texts(1, 5), texts()
    others = with_another_end(inputs, 11)
    [before], after = model(source, inputs), model(source.repeat(len(others), 1), others)
    for changed, logits in enumerate(after, start=1):
        torch.testing.assert_close(logits[:changed], before[:changed], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(logits[changed], before[changed])


@every_variant
def test_every_source_token_changes_every_logit(topology, choices, tiny_model):
    model, source, inputs = tiny_model(topology, **choices), texts(1, 5), texts()
    others = (source + torch.eye(5, dtype=torch.long)) % 11
    assert (model(others, inputs.repeat(5, 1)) != model(source.repeat(5, 1), inputs.repeat(5, 1))).any(-1).all()


@every_variant
def test_padding_of_the_source_never_matters(topology, choices, tiny_model):
    model, source, inputs = tiny_model(topology, **choices), texts(), texts()
    wide, is_token = with_padding(source, 3, 11)
    logits = model(wide, inputs.repeat(len(wide), 1), source_is_token=is_token)
    close(logits, model(source, inputs).expand_as(logits))


@every_variant
def test_padding_of_the_target_never_matters(topology, choices, tiny_model):
    model, source, inputs = tiny_model(topology, **choices), texts(), texts()
    wide, is_token = with_padding(inputs, 3, 11)
    logits = model(source.repeat(len(wide), 1), wide, is_token=is_token)
    assert logits.isfinite().all()
    found = without_padding(logits, is_token)
    close(found, model(source, inputs).expand_as(found))


@every_variant
def test_texts_of_a_batch_do_not_meet(topology, choices, tiny_model):
    model, source, inputs = tiny_model(topology, **choices), texts(3, 5), texts(3)
    is_token = torch.arange(5) < torch.tensor([[3], [5], [1]])
    for row, logits in enumerate(model(source, inputs, source_is_token=is_token)):
        alone = slice(row, row + 1)
        close(logits, model(source[alone, : is_token[row].sum()], inputs[alone])[0])


@every_variant
def test_padding_sends_no_gradient_that_is_not_a_number(topology, choices, tiny_model):
    model = tiny_model(topology, **choices)
    is_token = torch.tensor([[False, False, True, True], [True, True, True, False]])
    logits = model(texts(2, 4), texts(2, 4), source_is_token=is_token.flip(0), is_token=is_token)
    logits[is_token].logsumexp(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("choices", RECURRENT, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_finite_gradients_reach_every_weight_of_a_recurrent_model(choices, padding, tiny_model):
    model, every_token = tiny_model("rnn", **choices).train(), torch.arange(11).repeat(2, 1)
    is_token = torch.arange(11) < torch.tensor([[11], [0]]) if padding else None
    logits = model(every_token, every_token.flip(1), source_is_token=is_token, is_token=is_token)
    logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@both_topologies
def test_evaluation_is_deterministic_and_training_drops(topology, tiny_model):
    model, source, inputs = tiny_model(topology, dropout=0.3), texts(), texts()
    assert torch.equal(model(source, inputs), model(source, inputs))
    model.train()
    assert not torch.equal(model(source, inputs), model(source, inputs))


# With a cache


@every_variant
@pytest.mark.parametrize("padding", [False, True])
def test_cached_equals_uncached(topology, choices, padding, tiny_model):
    model, tokens = tiny_model(topology, **choices), texts(2)
    memory = model.encode(texts(2, 5), is_token=torch.arange(5) >= torch.tensor([[0], [2]]))
    is_token = torch.arange(LENGTH) >= torch.tensor([[0], [2]]) if padding else None
    expected = model.hidden_states(tokens, memory, is_token=is_token)
    splits = [[1, 3, 2]] if padding else [[split, LENGTH - split] for split in range(1, LENGTH)]
    for sizes in ([1] * LENGTH, *splits):
        cache, parts = model.new_cache(LENGTH), []
        for part in tokens.split(sizes, dim=1):
            new = is_token[:, cache.length : cache.length + part.size(1)] if padding else None
            parts.append(model.hidden_states(part, memory, is_token=new, cache=cache))
        close(torch.cat(parts, dim=1), expected)
        assert cache.length == LENGTH


def test_a_cache_that_outgrows_its_buffers_equals_uncached(tiny_model):
    model, tokens = tiny_model("encoder-decoder", context_length=80), texts(2, 70)
    memory = model.encode(texts(2, 5))
    close(token_by_token(model, tokens, memory, model.new_cache()), model.hidden_states(tokens, memory))


@both_topologies
def test_with_a_cache_the_memory_is_projected_once(topology, tiny_model):
    model, projected = tiny_model(topology), []
    if topology == "rnn":
        projections = [model.attention.key]
    else:
        attentions = [block.cross_attention for block in model.decoder.blocks]
        projections = [linear for attention in attentions for linear in (attention.key, attention.value)]
    for linear in projections:
        linear.register_forward_hook(lambda module, inputs, output: projected.append(module))
    token_by_token(model, texts(), model.encode(texts()), model.new_cache())
    assert projected == projections


def test_a_cache_has_a_layer_for_each_of_the_decoder(tiny_model):
    cache = tiny_model("encoder-decoder", num_decoder_layers=3).new_cache(7)
    assert len(cache.layers) == len(cache.memories) == 3
    assert cache.max_length == 7


@both_topologies
def test_a_new_cache_holds_the_context_and_more_tokens_than_it_holds_are_a_bug(topology, tiny_model):
    model = tiny_model(topology)
    assert model.new_cache().max_length == 32
    with pytest.raises(AssertionError, match="4 tokens in a cache for 3"):
        model.hidden_states(texts(1, 4), model.encode(texts()), cache=model.new_cache(3))


@both_topologies
@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [0, 1, 2, 2, 1]], ids=str)
def test_selected_rows_of_a_cache_and_of_a_memory_go_on_as_those_texts(topology, rows, tiny_model):
    model, tokens, chosen = tiny_model(topology), texts(3), torch.tensor(rows)
    memory = model.encode(texts(3, 5), is_token=torch.arange(5) < torch.tensor([[5], [3], [2]]))
    cache = model.new_cache()
    cache.select(chosen)
    token_by_token(model, tokens[:, :4], memory, cache)
    cache.select(chosen)
    after = model.hidden_states(tokens[chosen, 4:], memory.select(chosen), cache=cache)
    close(after, model.hidden_states(tokens, memory)[chosen, 4:])


@both_topologies
def test_reordered_beams_go_on_as_each_other_beside_the_same_memory(topology, tiny_model):
    model, tokens, rows = tiny_model(topology), texts(4), torch.tensor([1, 0, 3, 3])
    memory = model.encode(texts(2, 5)).select(torch.tensor([0, 0, 1, 1]))
    cache = model.new_cache()
    token_by_token(model, tokens[:, :4], memory, cache)
    cache.reorder(rows)
    after = model.hidden_states(tokens[rows, 4:], memory, cache=cache)
    close(after, model.hidden_states(tokens[rows], memory)[:, 4:])


def test_a_memory_selects_its_values_and_its_padding():
    values, is_token, rows = torch.randn(3, 4, 2), torch.rand(3, 4) < 0.5, torch.tensor([2, 0])
    chosen = Memory(values, is_token).select(rows)
    assert torch.equal(chosen.values, values[rows])
    assert torch.equal(chosen.is_token, is_token[rows])
    assert Memory(values).select(rows).is_token is None


@both_topologies
@pytest.mark.parametrize("choices", [{}, {"shared_embeddings": False}, {"target_vocab_size": 13}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_shared_and_tied_as_asked_for(topology, choices, tied, tiny_model):
    model = tiny_model(topology, **choices, tied_embeddings=tied)
    source, target = model.embedding.table.weight, model.target_embedding.table.weight
    assert (model.target_embedding is model.embedding) == (not choices)
    assert (source.data_ptr() == target.data_ptr()) == (not choices)
    assert (model.head.weight is target) == tied
    assert source.shape == (11, 16)
    assert target.shape == (choices.get("target_vocab_size", 11), 16)
    assert model(texts(), texts()).size(-1) == len(target)


def test_the_decoder_has_as_many_blocks_as_asked_for(tiny_model):
    model = tiny_model("encoder-decoder", num_decoder_layers=3)
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (2, 3)
    assert all(block.cross_attention is None for block in model.encoder.blocks)


@both_topologies
def test_logits_are_the_head_of_the_hidden_states(topology, tiny_model):
    model, source, inputs = tiny_model(topology), texts(2), texts(2)
    assert torch.equal(model(source, inputs), model.head(model.hidden_states(inputs, model.encode(source))))
