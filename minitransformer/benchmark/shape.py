"""The model shapes of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder with learned positions and its training batches, which all contestants support."""

    num_layers: int
    num_heads: int
    d_model: int
    context_length: int
    vocab_size: int
    batch_size: int
    dropout: float = 0.0
    bias: bool = False

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, {self.num_heads} heads, d_model {self.d_model}, context "
            f"{self.context_length}, batch {self.batch_size},\n           vocabulary {self.vocab_size:,}"
            f", dropout {self.dropout:g}"
        )


SHAPES = {
    "nanogpt-cpu": Shape(4, 4, 128, 64, 65, 12),
    "nanogpt-gpu": Shape(6, 6, 384, 256, 65, 64, dropout=0.2),
    "gpt2-124m": Shape(12, 12, 768, 1024, 50257, 8, bias=True),
}
"""nanoGPT's README on a CPU and on a GPU (characters of Tiny Shakespeare), and GPT-2's smallest."""
