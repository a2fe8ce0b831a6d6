"""The rows of a batch in one cache: sequences of different lengths that grow by as many tokens in each step."""

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
"""From new tokens of each row, their slots, the visible slots, and positions, to logits"""
MakeStep = Callable[[KVCache, int, bool], DecodeStep]
"""From a cache, the number of newest tokens to give logits for, and whether every visible slot holds a token, to a step

Where every slot holds one, its number is the position, and a step does not store those of new tokens.
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
    visible: Int[Tensor, "visible"],
    positions: Int[Tensor, "#rows new"],
) -> Float[Tensor, "rows {count} vocab"]:
    """The logits after each of the newest `count` tokens; the slots of `tokens` are the same in all rows."""
    # A single new token is the latest. Several take an explicit mask: a kernel's own depends on the number of keys,
    # which would become a constant of a recording.
    in_order, held = bool(tokens.size(1) == 1), visible[None] if full else None
    chosen = cache.at(slots, visible.size(0), full=full, in_order=in_order, rows=len(tokens), positions=held)
    hidden = model.hidden_states(tokens, positions=positions, cache=chosen)
    # Logits of all new tokens would take their number times the vocabulary.
    return model.head(hidden[:, -count:])


FEW_UNUSED = 32
"""slots before all rows that may be attended to in vain"""


class Rows:
    """Rows that all end at the same slot, and begin at slots of their own: left padding.

    All rows write to the same slots in a step, so that its shapes do not depend on what the rows hold. Slots before the
    beginning of a row are empty. Rows that are not in use are computed too, and ignored.
    """

    def __init__(self, model: DecoderLM, rows: int, slots: int, make_steps: Callable[[DecoderLM], MakeStep]) -> None:
        self.rows, self.slots = rows, slots
        self.cache = model.new_cache(slots)
        self.device = next(model.parameters()).device
        self._slots = torch.arange(slots, device=self.device)
        # Every row has positions of its own from the start: a recording holds the tensor that it writes to.
        self.cache.hold(torch.full((rows, 1), EMPTY, device=self.device), self._slots[:1], 1)
        self._make_steps, self._model = make_steps, model
        self._steps: dict[tuple[int, bool], DecodeStep] = {}
        self._make_step: MakeStep | None = None
        self.end = 0
        self.starts: dict[int, int] = {}
        """first slot of each row in use"""

    def length(self, row: int) -> int:
        """Number of tokens of the row."""
        return self.end - self.starts[row]

    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return self.end - min(self.starts.values(), default=self.end)

    def fill(self, rows: list[int], prefilled: KVCache, length: int) -> None:
        """Start these rows with the contents of `prefilled`: `length` tokens, of a row for each or of one for all."""
        if self.starts and self._is_aligned():
            self.cache.hold(self._slots[None, : self.end], self._slots[: self.end], self.end)
        if not self.starts:
            self.end = length
        elif length > self.end:
            self._move(length - self.end)
        self.starts.update(dict.fromkeys(rows, self.end - length))
        self.cache.put(prefilled, rows, self.end - length, self.rows)

    def free(self, row: int) -> None:
        """The row is no longer in use."""
        del self.starts[row]

    def clear(self) -> None:
        """No row is in use any more."""
        self.starts.clear()

    def truncate(self, slots: int) -> None:
        """Keep only the tokens in the first `slots` slots."""
        if slots < self.end:
            self.end = slots
            self.cache.truncate(slots)

    def decode(self, tokens: Int[Tensor, "rows new"], count: int = 1) -> Float[Tensor, "rows {count} vocab"]:
        """Append `tokens` to the first rows; the logits after each of the newest `count`. No other row is in use."""
        rows, new = tokens.shape
        unused = min(self.starts.values(), default=0)
        if self.end + new > self.slots or unused > max(FEW_UNUSED, (self.end - unused) // 4):
            self._move(-unused)
        aligned = self._is_aligned()
        slots = self._slots.narrow(0, self.end, new)
        if aligned:
            positions = slots[None]
        else:
            first = [self.end - self.starts.get(row, self.end) for row in range(rows)]
            positions = torch.tensor([[*range(one, one + new)] for one in first], device=self.device)
        self.end += new
        return self._step(count, aligned)(tokens, slots, self._slots.narrow(0, 0, self.end), positions)

    def _is_aligned(self) -> bool:
        """Whether all rows begin at the first slot: they have the same positions, and no empty slot to mask."""
        return not any(self.starts.values())

    def _step(self, count: int, aligned: bool) -> DecodeStep:
        if (count, aligned) not in self._steps:
            if self._make_step is None:
                self._make_step = self._make_steps(self._model)  # not before the prefill, which need not wait for it
            self._steps[count, aligned] = self._make_step(self.cache, count, aligned)
        return self._steps[count, aligned]

    def _move(self, by: int) -> None:
        """Shift all rows by this many slots; positions stay."""
        assert by, "a row has more tokens than there are slots"
        first = max(0, -by)
        self.cache.move(slice(first, self.end), first + by)
        self.end += by
        self.starts = {row: start + by for row, start in self.starts.items()}
