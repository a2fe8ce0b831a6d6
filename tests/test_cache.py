"""The cache: what was appended comes back, in order; and cached equals uncached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.cache import EMPTY, KVCache
from minitransformer.architecture.positions import token_positions
from tests.placements_for_tests import WHAT_A_STEP_NEEDS

LENGTH = 9


def append(cache: KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`k` and `v` to the next slots of the first layer; all that it holds."""
    slots = cache.reserve(token_positions(k.size(2)) + cache.next_position())
    return cache.layers[0].write(k, v, slots)


@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_all_keys_and_values_come_back_in_order(chunks: list[int]) -> None:
    keys, values = torch.randn(2, 3, sum(chunks), 4), torch.randn(2, 3, sum(chunks), 5)
    cache, read = KVCache(1, sum(chunks)), 0
    for chunk in chunks:
        new = slice(read, read + chunk)
        read += chunk
        k, v = append(cache, keys[:, :, new], values[:, :, new])
        assert cache.length == read
        assert torch.equal(k, keys[:, :, :read])
        assert torch.equal(v, values[:, :, :read])


def test_more_tokens_than_the_cache_holds_is_a_bug() -> None:
    cache = KVCache(1, 3)
    cache.reserve(token_positions(2))
    with pytest.raises(AssertionError, match="4 tokens in a cache for 3"):
        cache.reserve(token_positions(2))


def test_a_cache_keeps_the_type_of_the_keys_and_copies_neither_a_prompt_nor_what_it_has_room_for() -> None:
    cache, one = KVCache(1, 4), torch.ones(1, 1, 1, 2).bfloat16()
    prompt, _ = append(cache, one, one.clone())
    second, _ = append(cache, one.clone(), one.clone())
    third, _ = append(cache, one.clone(), one.clone())
    assert prompt.data_ptr() == one.data_ptr()
    assert third.dtype == torch.bfloat16
    assert second.data_ptr() == third.data_ptr()


class CacheOfLists:
    """A cache of 9 slots, and the position in each slot of each row by hand: None is an empty slot, or padding."""

    def __init__(self, rows: int) -> None:
        self.cache, self.length = KVCache(1, 9), 0
        self.rows: list[list[int | None]] = [[None] * 9 for _ in range(rows)]

    def read(self, data: st.DataObject) -> None:
        if self.length == 9:
            return
        new = data.draw(st.integers(1, 9 - self.length))
        is_token = torch.tensor([data.draw(st.lists(st.booleans(), min_size=new, max_size=new)) for _ in self.rows])
        slots = self.cache.reserve(token_positions(new, is_token), is_token)
        for row, positions in enumerate(self.rows):
            count = 0
            for slot in range(new):
                positions[self.length + slot] = count if is_token[row, slot] else None
                count += int(is_token[row, slot])
        self.length += new
        assert not slots.full
        assert slots.positions.tolist() == [as_stored(positions[: self.length]) for positions in self.rows]

    def reorder(self, data: st.DataObject) -> None:
        count = len(self.rows)
        chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        self.cache.reorder(torch.tensor(chosen))
        self.rows = [list(self.rows[row]) for row in chosen]

    def some_rows(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(self.rows) - 1), unique=True, min_size=1))

    def clear(self, data: st.DataObject) -> None:
        cleared = self.some_rows(data)
        self.cache.clear(cleared)
        for row in cleared:
            self.rows[row] = [None] * 9

    def put(self, data: st.DataObject) -> None:
        filled, slot, other = self.some_rows(data), data.draw(st.integers(0, 7)), KVCache(1, 2)
        other.reserve(token_positions(2))
        self.cache.put(other, filled, slot, len(self.rows))
        for row in filled:
            self.rows[row] = [None] * slot + [0, 1] + [None] * (7 - slot)

    def move(self, data: st.DataObject) -> None:
        first, last, to = (data.draw(st.integers(0, 9)) for _ in range(3))
        last = min(max(first, last), first + 9 - to)
        self.cache.move(slice(first, last), to)
        moved = [positions[first:last] for positions in self.rows]
        self.rows = [([None] * to + part + [None] * 9)[:9] for part in moved]


def as_stored(positions: list[int | None]) -> list[int]:
    return [EMPTY if position is None else position for position in positions]


@given(st.data(), st.integers(1, 3))
def test_a_cache_knows_the_position_in_each_slot_of_each_row_whatever_was_done_to_it(
    data: st.DataObject, rows: int
) -> None:
    both = CacheOfLists(rows)
    for _ in range(data.draw(st.integers(1, 6))):
        getattr(both, data.draw(st.sampled_from(["read", "reorder", "clear", "put", "move"])))(data)
    held = both.cache.at(torch.tensor([0]), 9, full=False, in_order=False).reserve(torch.full((rows, 1), 5))
    assert held.positions.tolist() == [[5, *as_stored(row[1:])] for row in both.rows]
    after = [1 + max(5, *[-1 if p is None else p for p in row[1:]]) for row in both.rows]
    assert both.cache.next_position().flatten().tolist() == after  # type: ignore[union-attr]


def test_a_new_cache_holds_the_context_unless_told_otherwise(tiny_decoder: Any) -> None:
    model = tiny_decoder()
    assert model.new_cache().max_length == 32
    assert model.new_cache(5).max_length == 5
    assert len(model.new_cache().layers) == 2
    assert KVCache(3, 4).length == 0


def test_two_caches_of_one_model_do_not_meet(tiny_decoder: Any) -> None:
    model, (one, other) = tiny_decoder(), torch.randint(0, 11, (2, 1, LENGTH))
    caches = model.new_cache(), model.new_cache()
    model(one[:, :4], cache=caches[0])
    model(other[:, :6], cache=caches[1])
    torch.testing.assert_close(model(one[:, 4:], cache=caches[0]), model(one)[:, 4:])
    torch.testing.assert_close(model(other[:, 6:], cache=caches[1]), model(other)[:, 6:])


VARIANTS: list[dict[str, Any]] = [
    *WHAT_A_STEP_NEEDS,
    *({"num_kv_heads": heads} for heads in (1, 2)),
    *({"attention_window": window} for window in (1, 3, LENGTH)),
    *({"attention_kernel": kernel} for kernel in ("by-hand", "fused")),
    {"qk_norm": "head", "bias": True, "scaled_embeddings": True, "head_dim": 6, "attention_scale": 0.7},
    {"attention_window": 3, "num_kv_heads": 2, "positions": "t5", "residual": "residual"},
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
        new = slice(read, read + chunk.size(1))
        parts.append(model(chunk, is_token=is_token[:, new], cache=cache))
        read = new.stop
    expected = model(tokens, is_token=is_token)
    torch.testing.assert_close(torch.cat(parts, dim=1)[is_token], expected[is_token], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choices", [{"token_smear": True}, {"attention_window": 3}, {"positions": "t5"}], ids=str)
def test_tokens_after_padding_are_what_they_are_without_it_in_a_cache_too(
    choices: dict[str, Any], tiny_decoder: Any
) -> None:
    model, tokens = tiny_decoder(**choices), torch.randint(0, 11, (2, LENGTH))
    padded = torch.cat([torch.full((2, 3), 5), tokens], dim=1)
    is_token = (torch.arange(LENGTH + 3) >= 3).expand(2, -1)
    expected, cache = model(tokens), model.new_cache(LENGTH + 3)
    torch.testing.assert_close(model(padded, is_token=is_token)[:, 3:], expected, rtol=1e-9, atol=1e-9)
    parts = zip(padded.split(1, dim=1), is_token.split(1, dim=1), strict=True)
    logits = torch.cat([model(token, is_token=real, cache=cache) for token, real in parts], dim=1)
    torch.testing.assert_close(logits[:, 3:], expected, rtol=1e-9, atol=1e-9)


def test_tokens_may_come_embedded(tiny_decoder: Any) -> None:
    model, tokens = tiny_decoder(scaled_embeddings=True), torch.randint(0, 11, (2, LENGTH))
    assert torch.equal(model(model.embedding(tokens)), model(tokens))


def test_rows_at_positions_far_apart_are_those_rows_alone(tiny_decoder: Any) -> None:
    """Positions are the caller's: each row of a cache has its own."""
    model, tokens, far = tiny_decoder(positions="alibi"), torch.randint(0, 11, (2, LENGTH)), torch.tensor([[0], [900]])
    positions, cache = torch.arange(LENGTH) + far, model.new_cache(LENGTH)
    read = model(tokens[:, :5], positions=positions[:, :5], cache=cache)
    logits = torch.cat([read, model(tokens[:, 5:], cache=cache)], dim=1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-9, atol=1e-9)
