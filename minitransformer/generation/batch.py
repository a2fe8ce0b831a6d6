"""The rows of a batch, in one cache: texts that begin at different times, each of which is given one token a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.cache import EMPTY, KVCache
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.surgery import copied

DecodeStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From new tokens of each row, their slots, a tensor as long as the visible slots, and positions, to logits"""
MakeStep = Callable[[KVCache, int, bool], DecodeStep]
"""From a cache, after how many of the newest tokens to give logits, and whether every visible slot holds a token

A step need not note the positions of new tokens in the cache where every slot holds one: nothing asks for them.
"""


def plain_steps(model: DecoderLM) -> MakeStep:
    """Steps that call a copy of `model` in eval mode, with the same weights."""
    return partial(plain_step, copied(model, lambda name, module: None).eval())


def plain_step(model: DecoderLM, cache: KVCache, count: int, full: bool) -> DecodeStep:
    """A step of `model`, which is in eval mode."""
    return partial(decode_rows, model, cache, count, full)


def decode_rows(
    model: DecoderLM,
    cache: KVCache,
    count: int,
    full: bool,
    tokens: Int[Tensor, "rows new"],
    slots: Int[Tensor, "new"],
    visible: Tensor,
    positions: Int[Tensor, "#rows new"],
) -> Float[Tensor, "rows {count} vocab"]:
    """The logits after each of the newest `count` tokens; the slots of `tokens` are the same in all rows."""
    # Nothing is later than a single new token. Several take a mask: kernels would draw it by a number of keys, which
    # grows.
    chosen = cache.at(slots, visible.size(0), full=full, in_order=bool(tokens.size(1) == 1))
    hidden = model.hidden_states(tokens, positions=positions, cache=chosen)
    # Logits of all tokens would be their number times the vocabulary.
    return model.head(hidden[:, -count:])


class Rows:
    """Rows whose tokens all end at the same slot, and begin at slots of their own.

    All rows write to one slot in a step, so that a step has the same shapes whatever the rows hold. Slots before the
    beginning of a row are empty. Rows that are not in use do what the others do, and nobody looks at it.
    """

    def __init__(self, model: DecoderLM, rows: int, slots: int, make_steps: Callable[[DecoderLM], MakeStep]) -> None:
        self.rows, self.slots = rows, slots
        self.cache = model.new_cache(slots)
        self.device = next(model.parameters()).device
        self._slots = torch.arange(slots, device=self.device)
        # Every row has positions of its own from the start: a recorded step writes to the tensor that it knows.
        self.cache.hold(torch.full((rows, 1), EMPTY, device=self.device), self._slots[:1], 1)
        self._make_steps, self._model = make_steps, model
        self._steps: dict[tuple[int, bool], DecodeStep] = {}
        self._make_step: MakeStep | None = None
        self.end = 0
        self.starts: dict[int, int] = {}
        """of the rows in use"""

    def length(self, row: int) -> int:
        """How many tokens the row holds."""
        return self.end - self.starts[row]

    def longest(self) -> int:
        """The most tokens that a row holds."""
        return self.end - min(self.starts.values(), default=self.end)

    def fill(self, rows: list[int], prefilled: KVCache, length: int) -> None:
        """From here on, these rows hold what `prefilled` has read, `length` tokens for each or for all alike."""
        if self.starts and self._is_aligned():
            self.cache.hold(self._slots[None, : self.end], self._slots[: self.end], self.end)
        if not self.starts:
            self.end = length
        elif length > self.end:
            self._move(length - self.end)
        self.starts.update(dict.fromkeys(rows, self.end - length))
        self.cache.put(prefilled, rows, self.end - length, self.rows)

    def free(self, row: int) -> None:
        """The row is not in use."""
        del self.starts[row]

    def clear(self) -> None:
        """No row is in use."""
        self.starts.clear()

    def truncate(self, slots: int) -> None:
        """Remove what lies beyond the first `slots` slots."""
        if slots < self.end:
            self.end = slots
            self.cache.truncate(slots)

    def decode(self, tokens: Int[Tensor, "rows new"], count: int = 1) -> Float[Tensor, "rows {count} vocab"]:
        """Append `tokens` to the rows; the logits after each of the newest `count`."""
        new = tokens.size(1)
        if self.end + new > self.slots:
            self._move(-min(self.starts.values()))
        aligned = self._is_aligned()
        slots = self._slots.narrow(0, self.end, new)
        if aligned:
            positions = slots[None]
        else:
            lengths = [self.end - self.starts.get(row, self.end) for row in range(self.rows)]
            positions = torch.tensor(lengths, device=self.device)[:, None] + self._slots[:new]
        self.end += new
        return self._step(count, aligned)(tokens, slots, self._slots.narrow(0, 0, self.end), positions)

    def _is_aligned(self) -> bool:
        """Whether all rows begin at the first slot: they have the same positions, and no empty slot to be masked."""
        return not any(self.starts.values())

    def _step(self, count: int, aligned: bool) -> DecodeStep:
        if (count, aligned) not in self._steps:
            if self._make_step is None:
                self._make_step = self._make_steps(self._model)  # after the prompts, which need not wait for it
            self._steps[count, aligned] = self._make_step(self.cache, count, aligned)
        return self._steps[count, aligned]

    def _move(self, by: int) -> None:
        """All that is held lies so many slots further; positions stay."""
        assert by, "a row has more tokens than there are slots"
        self.cache.roll(by)
        self.end += by
        self.starts = {row: start + by for row, start in self.starts.items()}
