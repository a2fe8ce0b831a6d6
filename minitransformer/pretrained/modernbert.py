"""ModernBERT: an encoder with rotary positions, gated networks, and a sliding window in most layers."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, SHAPE, Family, Field
from minitransformer.pretrained.rules import Halves, Rule, StackedHeads

BLOCK = "stack.blocks.{layer}."
THEIRS = "model.layers.{layer}."
# For each kind of layer, our base of its rotation, the field of older files, and its default.
BASES = {
    "full_attention": ("rotary_base", "global_rope_theta", 160_000.0),
    "sliding_attention": ("rotary_window_base", "local_rope_theta", 10_000.0),
}


class ModernBERTFamily(Family, name="modernbert"):
    """Warner et al. 2024 (arXiv 2412.13663). The embeddings are normalised, so the first attention's input is not."""

    architectures = {
        "encoder": "ModernBertForMaskedLM",
        "encoder-classifier": "ModernBertForSequenceClassification",
        "encoder-headless": "ModernBertModel",
    }
    fields = {
        **SHAPE,
        "intermediate_size": "d_ff",
        "norm_eps": Field("norm_eps", default=1e-5),
        "norm_bias": Field("norm_bias", default=False),
        "attention_bias": Field("qkv_bias", default=False),
        "mlp_bias": Field("bias", default=False),
        "decoder_bias": Field("head_bias", default=True),
        "classifier_bias": Field("transform_bias", default=False),
        "classifier_pooling": Field("pooled", {"cls": "first", "mean": "mean"}, "cls"),
        "classifier_activation": Field("pooling", {"gelu": "gelu", "relu": "relu", "tanh": "tanh"}, "gelu"),
        "hidden_activation": Field("feedforward", GATED, "gelu"),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {
        "residual": "pre",
        "first_norm": False,
        "embedding_norm": True,
        "norm": "layer",
        "positions": "rotary",
        "head": "transformed",
        "pooled_norm": True,
    }
    prefix = "model."
    rules = (
        Rule("model.embeddings.tok_embeddings", "embedding.table"),
        Rule("model.embeddings.norm", "stack.embedding_norm"),
        Rule(THEIRS + "attn_norm", BLOCK + "attention_residual.norm"),
        Rule(
            THEIRS + "attn.Wqkv",
            (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value"),
            StackedHeads(),
        ),
        Rule(THEIRS + "attn.Wo", BLOCK + "attention.output"),
        Rule(THEIRS + "mlp_norm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "mlp.Wi", (BLOCK + "feedforward.gate", BLOCK + "feedforward.up"), Halves()),
        Rule(THEIRS + "mlp.Wo", BLOCK + "feedforward.down"),
        Rule("model.final_norm", "stack.final_norm"),
        Rule("head.dense", "head.transform"),
        Rule("head.norm", "head.norm"),
        Rule("head.dense", "head.pool"),
        Rule("head.norm", "head.pool_norm"),
        Rule("decoder", "head.head"),
        Rule("classifier", "head.classify"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        if cls._topology(hf) == "encoder" and hf["classifier_activation"] != hf["hidden_activation"]:
            raise UserError(
                f"classifier_activation is {hf['classifier_activation']!r} and hidden_activation "
                f"{hf['hidden_activation']!r} in config.json: the head of masked tokens can only have the same one"
            )
        return {"attention_output_bias": hf["attention_bias"], **_read_layers(hf)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        sliding = [config.window_of(layer) is not None for layer in range(config.num_layers)]
        rotary = config.positions.settings
        local = rotary.window_base if any(sliding) else None
        bases = {"full_attention": rotary.base, "sliding_attention": rotary.base if local is None else local}
        activation = {} if config.topology == "encoder-classifier" else {"classifier_activation": _activation(config)}
        return {
            **activation,
            # Its default is beyond most vocabularies; an export with a tokenizer says which it is.
            "pad_token_id": None,
            "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
            "local_attention": 2 * ((config.attention_window or 65) - 1),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
            **{older: bases[kind] for kind, (_, older, _) in BASES.items()},
        }


def _activation(config: ModelConfig) -> str:
    """The activation of the feed-forward network, which the head of masked tokens shares."""
    return next(theirs for theirs, ours in GATED.items() if ours == config.feedforward.name)


def _read_layers(hf: HF) -> dict[str, Any]:
    """The window, which layers have it, and the bases of the rotations of both kinds."""
    every = hf.get("global_attn_every_n_layers") or 3
    usual = ["sliding_attention" if layer % every else "full_attention" for layer in range(hf["num_hidden_layers"])]
    sliding = tuple(kind == "sliding_attention" for kind in hf.get("layer_types") or usual)
    ours = {name: _base(hf, kind) for kind, (name, _, _) in BASES.items()}
    if not any(sliding):
        return {"rotary_base": ours["rotary_base"]}
    return {**ours, "attention_window": hf.get("local_attention", 128) // 2 + 1, "window_pattern": sliding}


def _base(hf: HF, kind: str) -> float:
    """The base of the rotation in layers of this kind; raises `UserError` for scaled frequencies."""
    _, older, default = BASES[kind]
    rope = {**(hf.get("rope_scaling") or {}), **((hf.get("rope_parameters") or {}).get(kind) or {})}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling != "default":
        raise UserError(f"rope_type is {scaling!r} in config.json: only 'default' can be loaded for modernbert")
    return float(rope.get("rope_theta") or hf.get(older) or default)
