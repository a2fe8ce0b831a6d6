"""The context window: which of the tokens so far a decoder sees.

A decoder sees `context_length` tokens at most. When its window is full, the oldest half is dropped, and the rest is
prefilled again at positions that start from 0; the window then grows again. Which tokens it holds follows from how
many there are, whether they were given or generated, so a prompt that is too long keeps its last tokens by the same
rule. Because the rest is prefilled again, this is exact for every position scheme.
"""

from __future__ import annotations


def window_length(total: int, context_length: int) -> int:
    """How many of `total` tokens, the last ones, are in the window of a model with this context length.

    All of them while they fit. One more than fits, and what remains is half of a full window and the newest token.
    """
    if total <= context_length:
        return total
    after_a_drop = context_length // 2 + 1
    return after_a_drop + (total - context_length - 1) % (context_length + 1 - after_a_drop)
