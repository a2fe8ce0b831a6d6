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

RowStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From a token of each row, its slot, a tensor with as many numbers as visible slots, and positions, to logits"""
MakeStep = Callable[[KVCache, bool], RowStep]
"""From a cache, and whether every visible slot holds a token, to what decodes a token of each row.

A step need not note the positions of new tokens in the cache where every slot holds one: nothing asks for them.
"""


def plain_steps(model: DecoderLM) -> MakeStep:
    """Steps that call a copy of `model` in eval mode, with the same weights."""
    return partial(plain_step, copied(model, lambda name, module: None).eval())


def plain_step(model: DecoderLM, cache: KVCache, full: bool) -> RowStep:
    """A step of `model`, which is in eval mode."""
    return partial(decode_rows, model, cache, full)


def decode_rows(
    model: DecoderLM,
    cache: KVCache,
    full: bool,
    tokens: Int[Tensor, "rows 1"],
    slot: Int[Tensor, "1"],
    visible: Tensor,
    positions: Int[Tensor, "#rows 1"],
) -> Float[Tensor, "rows vocab"]:
    """The logits after `tokens`, which all go to one slot."""
    # In every row, nothing is later than the one new token.
    chosen = cache.at(slot, visible.size(0), full=full, in_order=True)
    return model.head(model.hidden_states(tokens, positions=positions, cache=chosen)[:, -1])


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
        self._steps: dict[bool, RowStep] = {}
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

    def decode(self, tokens: Int[Tensor, "rows"]) -> Float[Tensor, "rows vocab"]:
        """Every row is given one token; the logits of the next."""
        if self.end == self.slots:
            self._move(-min(self.starts.values()))
        aligned = self._is_aligned()
        slot = self._slots.narrow(0, self.end, 1)
        if aligned:
            positions = slot[None]
        else:
            lengths = [self.end - self.starts.get(row, self.end) for row in range(self.rows)]
            positions = torch.tensor(lengths, device=self.device)[:, None]
        self.end += 1
        return self._step(aligned)(tokens[:, None], slot, self._slots.narrow(0, 0, self.end), positions)

    def _is_aligned(self) -> bool:
        """Whether all rows begin at the first slot: they have the same positions, and no empty slot to be masked."""
        return not any(self.starts.values())

    def _step(self, aligned: bool) -> RowStep:
        if aligned not in self._steps:
            if self._make_step is None:
                self._make_step = self._make_steps(self._model)  # after the prompts, which need not wait for it
            self._steps[aligned] = self._make_step(self.cache, aligned)
        return self._steps[aligned]

    def _move(self, by: int) -> None:
        """All that is held lies so many slots further; positions stay."""
        assert by, "a row has more tokens than there are slots"
        self.cache.roll(by)
        self.end += by
        self.starts = {row: start + by for row, start in self.starts.items()}
