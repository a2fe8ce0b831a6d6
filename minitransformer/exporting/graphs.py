"""Models as graphs: functions of tensors alone, whose caches are inputs and outputs.

What Python decides in a forward pass of ours must not depend on the tensors: attention by its equation, under a mask
that is computed from positions, is the same graph for every batch and length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from minitransformer.architecture.attention import MultiHeadAttention, scaled_dot_product_attention
from minitransformer.architecture.block import Memory
from minitransformer.architecture.cache import EMPTY, KeysAndValues, Slots
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder import EncoderLM
from minitransformer.models.encoder_decoder import EncoderDecoder
from minitransformer.models.model import Model
from minitransformer.models.surgery import copied

TOKENS, MASK, STATES, SOURCE_MASK = "input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"
ONE_OR_MORE, NONE_OR_MORE = Dim.AUTO(min=1), Dim.AUTO(min=0)
ANY = {0: ONE_OR_MORE, 1: ONE_OR_MORE}
"""of texts of any number and length"""


class GrownCache:
    """The keys and values of one layer, or the embeddings: those before, and after them the new ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, project: Callable[[], KeysAndValues], slots: Slots | None) -> KeysAndValues:
        """As `LayerCache.update`."""
        assert slots is not None
        return self.write(*project(), slots)

    def write(self, k: Tensor, v: Tensor, slots: Slots) -> KeysAndValues:
        """All keys and values, of which the new ones are the last."""
        self.keys, self.values = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        return self.keys, self.values


@dataclass
class GraphCache:
    """A cache as `KVCache`, whose contents are tensors that a graph takes and gives."""

    layers: list[GrownCache]
    embeddings: GrownCache
    is_token: Tensor
    """where the past and the new tokens are real, [batch, past + new]"""
    context_length: int
    memories: list[None] = field(default_factory=list)

    @property
    def positions(self) -> Tensor:
        """The number of real tokens before each."""
        return (self.is_token.long().cumsum(-1) - 1).clamp(min=0)

    def reserve(self, positions: Tensor, is_token: Tensor | None = None) -> Slots:
        """Slots after those of the past; attention sees all, in an order that only positions say."""
        held = self.positions.masked_fill(~self.is_token, EMPTY)
        new, visible = positions.size(1), held.size(1)
        return Slots(held, self.new_slots(positions), new, visible, self.context_length, full=False, in_order=False)

    def new_slots(self, tokens: Tensor) -> Tensor:
        """The slots of new tokens; computed, as a slice would be another graph where there is no past."""
        return torch.arange(tokens.size(1), device=tokens.device) + self.embeddings.keys.size(2)


class DecoderGraph(nn.Module):
    """(tokens, mask, past keys and values) → (logits, all keys and values) of a decoder."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = _cache(self.model.config, self.model.config.num_layers, attention_mask, past)
        positions = cache.positions[:, cache.new_slots(input_ids)]
        logits = self.model(input_ids, positions=positions, cache=cache)
        return logits, _tensors(self.model.config, cache)


class TargetGraph(nn.Module):
    """The decoder of an encoder-decoder: `DecoderGraph`, which also sees the states of the source."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        config = self.model.config
        cache = _cache(config, config.decoder_layers, attention_mask, past)
        positions = cache.positions[:, cache.new_slots(input_ids)]
        memory = Memory(encoder_hidden_states, encoder_attention_mask > 0)
        hidden = self.model.hidden_states(input_ids, memory, positions=positions, cache=cache)  # type: ignore[arg-type]
        return self.model.head(hidden), _tensors(config, cache)


class SourceGraph(nn.Module):
    """(tokens, mask) → states of the source."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.model.encode(input_ids, is_token=attention_mask > 0).values
        return states


class WholeGraph(nn.Module):
    """(tokens, mask) → logits or hidden states, of models that keep nothing between calls."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        compute: Any = self.model.token_logits if isinstance(self.model, EncoderLM) else self.model
        computed: Tensor = compute(input_ids, is_token=attention_mask > 0)
        return computed


def _cache(config: ModelConfig, layers: int, attention_mask: Tensor, past: list[Tensor]) -> GraphCache:
    pairs = [GrownCache(past[2 * layer], past[2 * layer + 1]) for layer in range(layers)]
    rest = past[2 * layers] if config.token_smear else past[0]
    return GraphCache(
        pairs, GrownCache(rest, rest[..., :0]), attention_mask > 0, config.context_length, [None] * layers
    )


def _tensors(config: ModelConfig, cache: GraphCache) -> list[Tensor]:
    found = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [*found, cache.embeddings.keys] if config.token_smear else found


@dataclass(frozen=True)
class Graph:
    """A module of tensors, an example of its inputs by name, and which of their dimensions may differ."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    dynamic: dict[str, Any]
    input_names: list[str]
    output_names: list[str]


def graphs_of(model: Model) -> list[Graph]:
    """The graphs that together are the model: one, or of an encoder-decoder two."""
    plain = _by_its_equation(model)
    if isinstance(plain, EncoderDecoder):
        return [_source_graph(plain), _target_graph(plain)]
    if isinstance(plain, DecoderLM):
        return [_decoder_graph(plain)]
    inputs, dynamic = _texts()
    output = "hidden_states" if model.config.topology == "encoder-headless" else "logits"
    return [Graph("model", WholeGraph(plain), inputs, dynamic, [TOKENS, MASK], [output])]


def past_names(config: ModelConfig, layers: int, when: str = "past") -> list[str]:
    """The names of a cache's tensors: past_key_values.0.key and so on, or present.0.key."""
    prefix = "past_key_values" if when == "past" else "present"
    names = [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [*names, f"{prefix}.embeddings"] if config.token_smear else names


def empty_past(config: ModelConfig, layers: int, batch: int, length: int = 0) -> list[Tensor]:
    """A cache of `length` tokens, all 0."""
    heads, width = config.num_kv_heads or config.num_heads, config.features_per_head
    found = [torch.zeros(batch, heads, length, width) for _ in range(2 * layers)]
    return [*found, torch.zeros(batch, 1, length, config.d_model)] if config.token_smear else found


def _by_its_equation(model: Model) -> Model:
    """A copy of the model, with the same weights, whose attention is `scaled_dot_product_attention`."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, MultiHeadAttention) or module.kernel is scaled_dot_product_attention:
            return None
        other = copied(module, lambda name, part: None)
        other.kernel = scaled_dot_product_attention
        return other

    return copied(model, replace).eval()


def _texts() -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    return {TOKENS: tokens, MASK: torch.ones_like(tokens)}, {TOKENS: ANY, MASK: ANY}


def _with_past(config: ModelConfig, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of three new tokens after five, of two texts."""
    past, total = empty_past(config, layers, batch=2, length=5), torch.ones(2, 8, dtype=torch.long)
    inputs = {TOKENS: torch.zeros(2, 3, dtype=torch.long), MASK: total, "past": past}
    dynamic = {TOKENS: ANY, MASK: ANY}
    return inputs, {**dynamic, "past": [{0: ONE_OR_MORE, 2: NONE_OR_MORE} for _ in past]}


def _decoder_graph(model: DecoderLM) -> Graph:
    config, layers = model.config, model.config.num_layers
    inputs, dynamic = _with_past(config, layers)
    names = [past_names(config, layers, when) for when in ("past", "present")]
    return Graph("model", DecoderGraph(model), inputs, dynamic, [TOKENS, MASK, *names[0]], ["logits", *names[1]])


def _source_graph(model: EncoderDecoder) -> Graph:
    inputs, dynamic = _texts()
    return Graph("encoder_model", SourceGraph(model), inputs, dynamic, [TOKENS, MASK], [STATES])


def _target_graph(model: EncoderDecoder) -> Graph:
    config, layers = model.config, model.config.decoder_layers
    inputs, dynamic = _with_past(config, layers)
    past, past_dynamic = inputs.pop("past"), dynamic.pop("past")
    states = {STATES: torch.zeros(2, 4, config.d_model), SOURCE_MASK: torch.ones(2, 4, dtype=torch.long)}
    inputs, dynamic = (
        {**inputs, **states, "past": past},
        {**dynamic, **dict.fromkeys(states, ANY), "past": past_dynamic},
    )
    names = [past_names(config, layers, when) for when in ("past", "present")]
    return Graph(
        "decoder_model",
        TargetGraph(model),
        inputs,
        dynamic,
        [TOKENS, MASK, STATES, SOURCE_MASK, *names[0]],
        ["logits", *names[1]],
    )
