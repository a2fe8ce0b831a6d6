"""Keys and values of the tokens already read, so that decoding reads each token once."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """The keys and values of one attention layer, in buffers for `max_length` tokens that the first call allocates."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(
        self, k: Float[Tensor, "batch heads new head_dim"], v: Float[Tensor, "batch heads new value_dim"]
    ) -> tuple[Float[Tensor, "batch heads all head_dim"], Float[Tensor, "batch heads all value_dim"]]:
        """Add the keys and values of new tokens; returns those of all tokens so far."""
        if self._keys is None or self._values is None:
            self._keys = k.new_empty((*k.shape[:2], self.max_length, k.size(3)))
            self._values = v.new_empty((*v.shape[:2], self.max_length, v.size(3)))
        start, self.length = self.length, self.length + k.size(2)
        assert self.length <= self.max_length, f"{self.length} tokens in a cache for {self.max_length}"
        self._keys[:, :, start : self.length] = k
        self._values[:, :, start : self.length] = v
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class KVCache:
    """One `LayerCache` for each layer. Whoever generates makes it and passes it down; no module keeps it."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for layer in self.layers:
            layer.length = min(length, layer.length)
