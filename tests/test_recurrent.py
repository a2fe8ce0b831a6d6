"""The recurrent encoder-decoder: its attention against a loop, and the laws that it shares with the Transformer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.additive_attention import AdditiveAttention, additive_attention_weights
from minitransformer.architecture.block import Memory
from minitransformer.architecture.init import Initialisation
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model, count_parameters
from minitransformer.models.recurrent import RecurrentEncoderDecoder
from tests.texts_for_tests import close, texts

D, LENGTH = 8, 6
SIZES = {"topology": "rnn", "d_model": D, "num_layers": 1, "context_length": 32, "vocab_size": 11}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "num_decoder_layers": 3},
    {"target_vocab_size": 13, "scaled_embeddings": True, "tied_embeddings": False},
    {"shared_embeddings": False, "dropout": 0.5},
]
every_variant = pytest.mark.parametrize("choices", VARIANTS, ids=str)


@pytest.fixture(scope="module")
def tiny(shake: Any) -> Any:
    def make(**choices: Any) -> RecurrentEncoderDecoder:
        return shake(RecurrentEncoderDecoder(ModelConfig(**{**SIZES, **choices}))).double().eval()

    return make


def padded(tokens: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """`tokens` with anything around them, and where they are."""
    inside = slice(left, left + tokens.size(1))
    wide = texts(len(tokens), left + tokens.size(1) + right)
    wide[:, inside] = tokens
    is_token = torch.zeros_like(wide).bool()
    is_token[:, inside] = True
    return wide, is_token


# Attention


@given(queries=st.integers(1, 3), keys=st.integers(1, 5), masked=st.booleans())
def test_additive_attention_is_that_of_a_loop_in_float64(queries: int, keys: int, masked: bool) -> None:
    q, k, v = torch.randn(2, queries, 4).double(), torch.randn(2, keys, 4).double(), torch.randn(4).double()
    mask = torch.rand(2, queries, keys) < 0.6 if masked else None
    weights = additive_attention_weights(q, k, v, mask=mask)
    for b in range(2):
        for i in range(queries):
            scores = [
                math.exp(sum(v[f].item() * math.tanh(q[b, i, f].item() + k[b, j, f].item()) for f in range(4)))
                if mask is None or mask[b, i, j]
                else 0.0
                for j in range(keys)
            ]
            expected = [score / (sum(scores) or 1.0) for score in scores]
            close(weights[b, i], torch.tensor(expected, dtype=torch.float64))


def test_a_text_of_padding_alone_has_no_context_and_no_gradient_that_is_not_a_number(shake: Any) -> None:
    attention, state, annotations = shake(AdditiveAttention(3, 4, 5)), torch.randn(2, 3), torch.randn(2, 6, 4)
    is_token = torch.tensor([[True] * 6, [False] * 6])
    context = attention(state, annotations, attention.key(annotations), is_token)
    assert context[0].all()
    assert not context[1].any()
    context.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


# The model


def reference(model: RecurrentEncoderDecoder, source: Tensor, inputs: Tensor) -> Tensor:
    """One text through a model of one layer, by the equations of the paper and of torch's GRU cell."""

    def step(gru: nn.GRU, suffix: str, x: Tensor, h: Tensor) -> Tensor:
        weights = [getattr(gru, f"{name}_l0{suffix}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        (xr, xz, xn), (hr, hz, hn) = (weights[0] @ x + weights[1]).chunk(3), (weights[2] @ h + weights[3]).chunk(3)
        reset, update = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        return (1 - update) * (xn + reset * hn).tanh() + update * h

    words = model.embedding.table.weight[source]
    forward, backward = [torch.zeros(D).double()], [torch.zeros(D).double()]
    for word in words:
        forward.append(step(model.encoder, "", word, forward[-1]))
    for word in words.flip(0):
        backward.append(step(model.encoder, "_reverse", word, backward[-1]))
    annotations = torch.cat([torch.stack(forward[1:]), torch.stack(backward[:0:-1])], dim=1)
    state = (model.first_state.weight @ backward[-1] + model.first_state.bias).tanh()
    attention, logits = model.attention, []
    for word in model.target_embedding.table.weight[inputs]:
        scores = [(attention.query.weight @ state + attention.key.weight @ h).tanh() for h in annotations]
        context = (torch.stack(scores) @ attention.score.weight[0]).softmax(0) @ annotations
        state = step(model.decoder, "", torch.cat([word, context]), state)
        before = model.readout.weight @ torch.cat([state, word, context]) + model.readout.bias
        logits.append(model.head.weight @ torch.stack([before[::2], before[1::2]]).amax(0))
    return torch.stack(logits)


def test_the_model_is_its_equations(tiny: Any) -> None:
    model, source, inputs = tiny(), texts(), texts(length=4)
    close(model(source, inputs)[0], reference(model, source[0], inputs[0]))


@every_variant
@settings(max_examples=10)
@given(changed=st.integers(1, LENGTH - 1))
def test_a_future_target_token_never_changes_past_logits(choices: dict[str, Any], changed: int, tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(2, 5), texts(2)
    others = inputs.clone()
    others[:, changed:] = (others[:, changed:] + 1) % 11
    before, after = model(source, inputs), model(source, others)
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert not torch.allclose(after[:, changed], before[:, changed])


@every_variant
def test_every_source_token_changes_every_logit(choices: dict[str, Any], tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(1, 5), texts()
    for place in range(5):
        other = source.clone()
        other[:, place] = (other[:, place] + 1) % 11
        assert (model(other, inputs) != model(source, inputs)).any(-1).all()


@every_variant
@settings(max_examples=10)
@given(left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_of_the_source_never_matters(choices: dict[str, Any], left: int, right: int, tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(), texts()
    wide, is_token = padded(source, left, right)
    close(model(wide, inputs, source_is_token=is_token), model(source, inputs))


@every_variant
@settings(max_examples=10)
@given(left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_of_the_target_never_matters(choices: dict[str, Any], left: int, right: int, tiny: Any) -> None:
    model, source, inputs = tiny(**choices), texts(), texts()
    wide, is_token = padded(inputs, left, right)
    close(model(source, wide, is_token=is_token)[:, left : left + LENGTH], model(source, inputs))


def test_padding_between_tokens_does_not_matter_either(tiny: Any) -> None:
    model, source, inputs, wide = tiny(), texts(), texts(), texts(1, 9)
    is_token = torch.tensor([[True, False, True, True, False, False, True, True, True]])
    wide[is_token] = source[0]
    close(model(wide, inputs, source_is_token=is_token), model(source, inputs))
    wide[is_token] = inputs[0]
    close(model(source, wide, is_token=is_token)[is_token], model(source, inputs)[0])


def test_texts_of_a_batch_do_not_meet(tiny: Any) -> None:
    model, source, inputs = tiny(num_layers=2), texts(3, 5), texts(3)
    is_token = torch.arange(5) < torch.tensor([[3], [5], [1]])
    for row, logits in enumerate(model(source, inputs, source_is_token=is_token)):
        alone = slice(row, row + 1)
        close(logits, model(source[alone, : is_token[row].sum()], inputs[alone])[0])


def test_an_empty_source_is_an_empty_source_whatever_its_padding_holds(tiny: Any) -> None:
    model, inputs, nothing = tiny(), texts(), torch.zeros(1, 4).bool()
    logits = [model(texts(1, 4), inputs, source_is_token=nothing) for _ in range(2)]
    assert logits[0].isfinite().all()
    close(logits[0], logits[1])


@every_variant
@pytest.mark.parametrize("with_padding", [True, False])
def test_finite_gradients_reach_every_weight(choices: dict[str, Any], with_padding: bool, tiny: Any) -> None:
    model, every_token = tiny(**choices).train(), torch.arange(11).repeat(2, 1)
    is_token = torch.arange(11) < torch.tensor([[11], [0]]) if with_padding else None
    logits = model(every_token, every_token.flip(1), source_is_token=is_token, is_token=is_token)
    logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# With a cache


@every_variant
def test_cached_equals_uncached(choices: dict[str, Any], tiny: Any) -> None:
    model, tokens = tiny(**choices), texts(2)
    memory = model.encode(texts(2, 5), is_token=torch.arange(5) >= torch.tensor([[0], [2]]))
    is_token = torch.arange(LENGTH) >= torch.tensor([[0], [2]])
    expected = model.hidden_states(tokens, memory, is_token=is_token)
    for sizes in ([1] * LENGTH, [4, 2], [1, 3, 2]):
        cache, parts = model.new_cache(LENGTH), []
        for part in tokens.split(sizes, dim=1):
            new = is_token[:, cache.length : cache.length + part.size(1)]
            parts.append(model.hidden_states(part, memory, is_token=new, cache=cache))
        close(torch.cat(parts, dim=1), expected)
        assert cache.length == LENGTH


def test_with_a_cache_the_memory_is_projected_once(tiny: Any) -> None:
    model, projected, cache = tiny(), [], tiny().new_cache()
    model.attention.key.register_forward_hook(lambda module, inputs, output: projected.append(module))
    memory = model.encode(texts())
    for token in texts().split(1, dim=1):
        model.hidden_states(token, memory, cache=cache)
    assert len(projected) == 1


@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [0, 1, 2, 2, 1]], ids=str)
def test_selected_rows_of_a_cache_go_on_as_those_texts(rows: list[int], tiny: Any) -> None:
    model, tokens, chosen = tiny(num_layers=2), texts(3), torch.tensor(rows)
    memory = model.encode(texts(3, 5), is_token=torch.arange(5) < torch.tensor([[5], [3], [2]]))
    cache = model.new_cache()
    cache.select(chosen)
    model.hidden_states(tokens[:, :4], memory, cache=cache)
    cache.select(chosen)
    after = model.hidden_states(tokens[chosen, 4:], memory.select(chosen), cache=cache)
    close(after, model.hidden_states(tokens, memory)[chosen, 4:])


def test_reordered_beams_go_on_as_each_other_beside_the_same_memory(tiny: Any) -> None:
    model, tokens, rows = tiny(), texts(4), torch.tensor([1, 0, 3, 3])
    memory = model.encode(texts(2, 5)).select(torch.tensor([0, 0, 1, 1]))
    cache = model.new_cache()
    model.hidden_states(tokens[:, :4], memory, cache=cache)
    cache.reorder(rows)
    after = model.hidden_states(tokens[rows, 4:], memory, cache=cache)
    close(after, model.hidden_states(tokens[rows], memory)[:, 4:])


def test_more_tokens_than_the_cache_holds_is_a_bug(tiny: Any) -> None:
    model, memory = tiny(), Memory(torch.randn(1, 3, 2 * D).double())
    assert model.new_cache().max_length == 32
    with pytest.raises(AssertionError, match="4 tokens in a cache for 3"):
        model.hidden_states(texts(1, 4), memory, cache=model.new_cache(3))


# Its weights


@every_variant
def test_tables_are_shared_and_tied_as_asked_for(choices: dict[str, Any], tiny: Any) -> None:
    model = tiny(**choices)
    one_table = model.config.shared_embeddings and model.config.target_vocab_size is None
    assert (model.target_embedding is model.embedding) == one_table
    assert (model.head.weight is model.target_embedding.table.weight) == model.config.tied_embeddings
    assert model(texts(), texts()).size(-1) == choices.get("target_vocab_size", 11)


@pytest.mark.parametrize("name", Initialisation.registry)
def test_gates_start_with_orthogonal_recurrence_and_without_biases(name: str) -> None:
    model = RecurrentEncoderDecoder(ModelConfig(**{**SIZES, "init": name, "num_layers": 2, "d_model": 64}))
    for parameter_name, parameter in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
        for gate in parameter.chunk(3):
            if parameter_name.startswith("bias"):
                assert not gate.any()
            elif parameter_name.startswith("weight_hh"):
                torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=1e-4, atol=1e-5)
            else:
                expected = torch.empty_like(gate)
                Initialisation.choose(name).make().linear(expected)
                assert gate.std().item() == pytest.approx(expected.std().item(), rel=0.05)


def test_the_configuration_makes_it_and_its_parameters_are_counted_without_weights() -> None:
    config = ModelConfig(**SIZES)
    model = build_model(config)
    assert isinstance(model, RecurrentEncoderDecoder)
    encoder, decoder = 2 * 3 * D * (D + D + 2), 3 * D * (3 * D + D + 2)
    linears = (D * D + D) + (D * D + 2 * D * D + D) + (4 * D * 2 * D + 2 * D)
    assert model.num_parameters() == count_parameters(config) == 11 * D + encoder + decoder + linears


def test_evaluation_is_deterministic_and_training_drops(tiny: Any) -> None:
    model, source, inputs = tiny(num_layers=2, dropout=0.3), texts(), texts()
    assert torch.equal(model(source, inputs), model(source, inputs))
    model.train()
    assert not torch.equal(model(source, inputs), model(source, inputs))


def test_flops_are_six_for_each_weight_of_a_product_and_those_of_attention(tiny: Any) -> None:
    gates = 2 * 3 * D * (D + D) + 3 * D * (3 * D + D)
    linears = D * D + (D * D + 2 * D * D + D) + 4 * D * 2 * D + 11 * D
    assert tiny().flops_per_token(10) == 6 * (gates + linears) + 6 * (D + 2 * D) * 10
