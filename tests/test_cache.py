"""The cache: what was appended comes back, in order; and cached equals uncached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.architecture.cache import KVCache, LayerCache
from minitransformer.architecture.positions import PositionScheme
from tests.placements_for_tests import EVERY_PLACEMENT

LENGTH = 9


@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_all_keys_and_values_come_back_in_order(chunks: list[int]) -> None:
    keys, values = torch.randn(2, 3, sum(chunks), 4), torch.randn(2, 3, sum(chunks), 5)
    cache, read = LayerCache(sum(chunks)), 0
    for chunk in chunks:
        new = slice(read, read + chunk)
        read += chunk
        k, v = cache.append(keys[:, :, new], values[:, :, new])
        assert cache.length == read
        assert torch.equal(k, keys[:, :, :read])
        assert torch.equal(v, values[:, :, :read])


def test_more_tokens_than_the_cache_holds_is_a_bug() -> None:
    cache = LayerCache(3)
    cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(AssertionError, match="4 tokens in a cache for 3"):
        cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


def test_a_cache_keeps_the_type_of_the_keys_and_copies_neither_a_prompt_nor_what_it_has_room_for() -> None:
    cache, one = LayerCache(4), torch.ones(1, 1, 1, 2).bfloat16()
    prompt, _ = cache.append(one, one.clone())
    second, _ = cache.append(one.clone(), one.clone())
    third, _ = cache.append(one.clone(), one.clone())
    assert prompt.data_ptr() == one.data_ptr()
    assert third.dtype == torch.bfloat16
    assert second.data_ptr() == third.data_ptr()


def test_a_truncated_cache_goes_on_from_there(tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(), torch.randint(0, 11, (2, LENGTH))
    cache = model.new_cache()
    model(torch.randint(0, 11, (2, 7)), cache=cache)
    cache.truncate(0)
    model(tokens[:, :6], cache=cache)
    cache.truncate(20)
    assert cache.length == 6
    cache.truncate(3)
    assert [layer.length for layer in cache.layers] == [3, 3]
    torch.testing.assert_close(model(tokens[:, 3:], cache=cache), model(tokens)[:, 3:])


def test_a_new_cache_holds_the_context_unless_told_otherwise(tiny_decoder: Any) -> None:
    model = tiny_decoder()
    assert [layer.max_length for layer in model.new_cache().layers] == [32, 32]
    assert [layer.max_length for layer in model.new_cache(5).layers] == [5, 5]
    assert KVCache(3, 4).length == 0


def test_two_caches_of_one_model_do_not_meet(tiny_decoder: Any) -> None:
    model, (one, other) = tiny_decoder(), torch.randint(0, 11, (2, 1, LENGTH))
    caches = model.new_cache(), model.new_cache()
    model(one[:, :4], cache=caches[0])
    model(other[:, :6], cache=caches[1])
    torch.testing.assert_close(model(one[:, 4:], cache=caches[0]), model(one)[:, 4:])
    torch.testing.assert_close(model(other[:, 6:], cache=caches[1]), model(other)[:, 6:])


VARIANTS: list[dict[str, Any]] = [
    *({"positions": name} for name in PositionScheme.registry),
    *EVERY_PLACEMENT,
    *({"num_kv_heads": heads} for heads in (1, 2)),
    *({"attention_window": window} for window in (1, 3, LENGTH)),
    *({"attention_kernel": kernel} for kernel in ("by-hand", "fused")),
    {"qk_norm": "head", "bias": True, "scaled_embeddings": True, "head_dim": 6, "attention_scale": 0.7},
    {"attention_window": 3, "num_kv_heads": 2, "positions": "t5", "residual": "residual"},
    {"token_smear": True},
]
every_variant = pytest.mark.parametrize("choices", VARIANTS, ids=str)


@every_variant
def test_cached_equals_uncached_for_every_split(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (2, LENGTH))
    expected = model(tokens)
    for split in range(1, LENGTH):
        cache = model.new_cache(LENGTH)
        logits = torch.cat([model(tokens[:, :split], cache=cache), model(tokens[:, split:], cache=cache)], dim=1)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@every_variant
def test_token_by_token_equals_at_once(choices: dict[str, Any], tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (2, LENGTH))
    cache = model.new_cache(LENGTH)
    logits = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-9, atol=1e-9)


@every_variant
@settings(max_examples=5)
@given(chunks=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_prefill_in_chunks_with_left_padding_equals_at_once(
    choices: dict[str, Any], chunks: list[int], tiny_decoder: Any
) -> None:
    model, length = tiny_decoder(**choices), sum(chunks)
    tokens = torch.randint(0, 11, (3, length))
    is_token = torch.arange(length) >= torch.tensor([0, 1, length - 1])[:, None]
    cache, parts, read = model.new_cache(length), [], 0
    for chunk in tokens.split(chunks, dim=1):
        read += chunk.size(1)
        parts.append(model(chunk, is_token=is_token[:, :read], cache=cache))
    expected = model(tokens, is_token=is_token)
    torch.testing.assert_close(torch.cat(parts, dim=1)[is_token], expected[is_token], rtol=1e-9, atol=1e-9)
