"""The recurrent encoder-decoder with attention that preceded the Transformer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from minitransformer.architecture.additive_attention import AdditiveAttention
from minitransformer.architecture.block import Memory
from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.models.build import build_head
from minitransformer.models.config import ModelConfig
from minitransformer.models.encoder_decoder import Seq2SeqLM


class RecurrentCache:
    """The state after the tokens so far, and the attention keys of the memory, projected once."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.state: Float[Tensor, "layers batch d_model"] | None = None
        self.keys: Float[Tensor, "batch source d_model"] | None = None

    def keep(self, state: Float[Tensor, "layers batch d_model"], keys: Tensor, new: int) -> None:
        """Store the state after `new` more tokens."""
        self.state, self.keys, self.length = state, keys, self.length + new
        assert self.length <= self.max_length, f"{self.length} tokens in a cache for {self.max_length}"

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in this order; rows may repeat."""
        self.reorder(rows)
        self.keys = None if self.keys is None else self.keys[rows]

    def reorder(self, rows: Int[Tensor, "batch"]) -> None:
        """`select`, where each row is replaced by one with the same memory, as in beam search."""
        self.state = None if self.state is None else self.state[:, rows]


class RecurrentEncoderDecoder(Seq2SeqLM, name="rnn"):
    """hⱼ = [h⃗ⱼ; h⃖ⱼ], cᵢ = Σⱼ αᵢⱼ hⱼ, sᵢ = GRU([yᵢ₋₁; cᵢ], sᵢ₋₁); logits of yᵢ = head(maxout(U sᵢ + V yᵢ₋₁ + C cᵢ)).

    α attends from sᵢ₋₁, the state of the last layer, to the annotations h of a bidirectional encoder. Bahdanau et al.
    2014 (arXiv 1409.0473), section 3 and appendix A, with torch's GRU, whose reset gate follows the matrix product.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.encoder = _GRU(d, d, config.num_layers, config.dropout, bidirectional=True)
        self.first_state = nn.Linear(d, config.decoder_layers * d)
        self.attention = AdditiveAttention(d, 2 * d, d)
        self.decoder = _GRU(3 * d, d, config.decoder_layers, config.dropout)
        self.readout = nn.Linear(4 * d, 2 * d)
        self.dropout = Dropout(config.dropout)
        self.head = build_head(config, self.target_embedding)

    def encode(
        self, source: Int[Tensor, "batch source"], *, is_token: Bool[Tensor, "batch source"] | None = None
    ) -> Memory:
        """The annotations that the decoder attends to; `is_token` is False at padding."""
        x = self.dropout(self.embedding(source))
        return Memory(self.encoder(x)[0] if is_token is None else _without_padding(self.encoder, x, is_token), is_token)

    def hidden_states(
        self,
        tokens: TokensOrEmbeddings,
        memory: Memory,
        *,
        is_token: Bool[Tensor, "batch length"] | None = None,
        cache: RecurrentCache | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The decoder's last hidden states, [batch, length, d_model]; `tokens` are target ids or embeddings.

        Tokens follow those in `cache`. `is_token` is False at padding, which leaves the state unchanged.
        """
        x = self.dropout(self.target_embedding(tokens))
        if cache is None or cache.state is None or cache.keys is None:
            state, keys = self._first_state(memory), self.attention.key(memory.values)
        else:
            state, keys = cache.state, cache.keys
        steps = []
        for place, word in enumerate(x.unbind(1)):
            context = self.attention(state[-1], memory.values, keys, memory.is_token)
            after = self.decoder(torch.cat([word, context], dim=-1)[:, None], state.contiguous())[1]
            state = after if is_token is None else torch.where(is_token[:, place, None], after, state)
            steps.append(torch.cat([state[-1], word, context], dim=-1))
        if cache is not None:
            cache.keep(state, keys, tokens.size(1))
        maxout = self.readout(torch.stack(steps, dim=1)).unflatten(-1, (-1, 2)).amax(-1)
        return self.dropout(maxout)

    def new_cache(self, max_length: int | None = None) -> RecurrentCache:
        """An empty cache for `max_length` target tokens (default: the context length)."""
        return RecurrentCache(max_length or self.config.context_length)

    def flops_per_token(self, length: int) -> int:
        """6 per weight of a matrix product, and per feature of each score and annotation."""
        linears = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        recurrent = [weight for gru in (self.encoder, self.decoder) for weight in gru.parameters() if weight.dim() == 2]
        return 6 * sum(weight.numel() for weight in linears + recurrent) + 6 * 3 * self.config.d_model * length

    def _first_state(self, memory: Memory) -> Float[Tensor, "layers batch d_model"]:
        """s₀ = tanh(W h⃖₁) for each layer, from the backward encoder's last state. Appendix A.2.2."""
        backward = memory.values[..., self.config.d_model :]
        if memory.is_token is None:
            first = backward[:, 0]
        else:
            rows = torch.arange(len(backward), device=backward.device)
            first = backward[rows, memory.is_token.long().argmax(-1)]
        return self.first_state(first).tanh().unflatten(-1, (-1, self.config.d_model)).transpose(0, 1)


class _GRU(nn.GRU):
    """torch's GRU with our dropout between layers, which depends on the row of a batch alone."""

    def __init__(
        self, features: int, hidden: int, num_layers: int, dropout: float, *, bidirectional: bool = False
    ) -> None:
        super().__init__(features, hidden, num_layers, batch_first=True, bidirectional=bidirectional)
        self.between = Dropout(dropout)

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        if self.num_layers == 1 or not (self.training and self.between.p):
            return super().forward(input, hx)
        directions = 1 + self.bidirectional
        lasts, per_layer = [], len(self._flat_weights) // self.num_layers
        for layer in range(self.num_layers):
            if layer:
                input = self._dropped(input)
            weights = self._flat_weights[layer * per_layer :][:per_layer]
            state = None if hx is None else hx[layer * directions :][:directions]
            input, last = self._layer(weights, input, state)
            lasts.append(last)
        return input, torch.cat(lasts)

    def _dropped(self, x: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(x, Tensor):
            return self.between(x)
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return pack_padded_sequence(self.between(padded), lengths, batch_first=True, enforce_sorted=False)

    def _layer(self, weights: Any, x: Any, state: Tensor | None) -> tuple[Any, Tensor]:
        packed = isinstance(x, PackedSequence)
        first, rows = (x.data, int(x.batch_sizes[0])) if packed else (x, x.size(0))
        if state is None:
            state = first.new_zeros(1 + self.bidirectional, rows, self.hidden_size)
        settings = (weights, True, 1, 0.0, True, self.bidirectional)
        if not packed:
            return torch.gru(x, state, *settings, True)
        outputs, last = torch.gru(x.data, x.batch_sizes, state, *settings)
        return x._replace(data=outputs), last


def _without_padding(
    gru: nn.GRU, x: Float[Tensor, "batch length features"], is_token: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length outputs"]:
    """The outputs of `gru` over real tokens only, and 0 at padding, on either side."""
    tokens_first = (~is_token).byte().argsort(dim=-1, stable=True)
    places = tokens_first.argsort(dim=-1)
    x = x.take_along_dim(tokens_first[..., None], dim=1)
    lengths = is_token.sum(-1).clamp(min=1).cpu()  # torch cannot pack an empty sequence
    packed = gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
    outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=int(x.size(1)))
    return outputs.take_along_dim(places[..., None], dim=1) * is_token[..., None]
