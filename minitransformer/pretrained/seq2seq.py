"""Encoder-decoders: T5, Marian, BART, Pegasus."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minitransformer.architecture.feedforward import GatedFeedForward
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import ACTIVATIONS, HF, SILU, Family, Field
from minitransformer.pretrained.rules import Row, Rule, WithoutFirst

ENCODER = "encoder.blocks.{layer}."
DECODER = "decoder.blocks.{decoder_layer}."
T5_ENCODER = "encoder.block.{layer}.layer."
T5_DECODER = "decoder.block.{decoder_layer}.layer."


def t5_sublayers(theirs: str, ours: str, feedforward: int) -> tuple[Rule, ...]:
    """The rules of a block with the feed-forward network as sublayer 1, or 2 after cross-attention."""
    attentions = {"0.SelfAttention": "attention", "1.EncDecAttention": "cross_attention"}
    norms = {"0": "attention_residual", str(feedforward): "feedforward_residual"}
    if feedforward == 1:
        del attentions["1.EncDecAttention"]
    else:
        norms["1"] = "cross_attention_residual"
    dense = f"{theirs}{feedforward}.DenseReluDense."
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return (
        *(Rule(f"{theirs}{a}.{q}", f"{ours}{b}.{query}") for a, b in attentions.items() for q, query in names.items()),
        *(Rule(f"{theirs}{number}.layer_norm", f"{ours}{residual}.norm") for number, residual in norms.items()),
        Rule(dense + "wi_0", ours + "feedforward.gate"),
        Rule(dense + "wo", ours + "feedforward.down"),
    )


T5_ACTIVATION = Field(
    "feedforward", {"relu": "relu", "gated-gelu": "geglu-tanh", "gated-silu": "swiglu", "gated-relu": "reglu"}, "relu"
)


class T5Family(Family, name="t5"):
    """Raffel et al. 2019 (arXiv 1910.10683), and its version 1.1: gated, with an untied head."""

    architectures = {"encoder-decoder": "T5ForConditionalGeneration"}
    fields = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "d_kv": "head_dim",
        "d_ff": "d_ff",
        "num_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_heads",
        "n_positions": Field("context_length", default=512),
        "layer_norm_epsilon": Field("norm_eps", default=1e-6),
        "relative_attention_num_buckets": Field("t5_buckets", default=32),
        "relative_attention_max_distance": Field("t5_max_distance", default=128),
        "feed_forward_proj": T5_ACTIVATION,
    }
    fixed = {"residual": "pre", "norm": "rms", "positions": "t5", "bias": False, "attention_scale": 1.0}
    required = {"is_encoder_decoder": True}

    @classmethod
    def rules_for(cls, config: ModelConfig) -> tuple[Rule, ...]:
        up = "wi_1" if issubclass(config.feedforward.variant, GatedFeedForward) else "wi"
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
        return (
            Rule("shared", "embedding.table"),
            Rule(f"encoder.{bias}", "encoder.positions.table"),
            Rule(f"decoder.{bias}", "decoder.positions.table"),
            *t5_sublayers(T5_ENCODER, ENCODER, feedforward=1),
            *t5_sublayers(T5_DECODER, DECODER, feedforward=2),
            Rule(f"{T5_ENCODER}1.DenseReluDense.{up}", ENCODER + "feedforward.up"),
            Rule(f"{T5_DECODER}2.DenseReluDense.{up}", DECODER + "feedforward.up"),
            Rule("encoder.final_layer_norm", "encoder.final_norm"),
            Rule("decoder.final_layer_norm", "decoder.final_norm"),
            Rule("lm_head", "head"),
            Rule("encoder.embed_tokens", "embedding.table"),
            Rule("decoder.embed_tokens", "embedding.table"),
        )

    # The first versions stored this table and never used it.
    ignored = (r"EncDecAttention\.relative_attention_bias",)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
        return {"tied_embeddings": has_no_head(hf), "logit_scale": hf["d_model"] ** -0.5 if scaled else 1.0}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"tie_word_embeddings": config.tied_embeddings, "scale_decoder_outputs": config.logit_scale != 1.0}


def has_no_head(hf: HF) -> bool:
    """Whether the head is tied, by the tensors, or without them by the configuration."""
    return not hf["has_head"] if "has_head" in hf else bool(hf.get("tie_word_embeddings", True))


class MT5Family(T5Family, name="mt5"):
    """Xue et al. 2020 (arXiv 2010.11934): T5's version 1.1, without scaling of the head's input."""

    architectures = {"encoder-decoder": "MT5ForConditionalGeneration"}
    fields = {**T5Family.fields, "feed_forward_proj": replace(T5_ACTIVATION, default="gated-gelu")}
    fixed = {**T5Family.fixed, "logit_scale": 1.0}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"tied_embeddings": has_no_head(hf)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"tie_word_embeddings": config.tied_embeddings}


def bart_block(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of a block of BART, Marian or OPT."""
    rules: list[Rule] = []
    for attention, name in (("self_attn", "attention"), ("encoder_attn", "cross_attention")):
        rules += [
            Rule(f"{theirs}{attention}.q_proj", f"{ours}{name}.query"),
            Rule(f"{theirs}{attention}.k_proj", f"{ours}{name}.key"),
            Rule(f"{theirs}{attention}.v_proj", f"{ours}{name}.value"),
            Rule(f"{theirs}{attention}.out_proj", f"{ours}{name}.output"),
            Rule(f"{theirs}{attention}_layer_norm", f"{ours}{name}_residual.norm"),
        ]
    return (
        *rules,
        Rule(f"{theirs}fc1", f"{ours}feedforward.up"),
        Rule(f"{theirs}fc2", f"{ours}feedforward.down"),
        Rule(f"{theirs}final_layer_norm", f"{ours}feedforward_residual.norm"),
    )


BART_RULES = (
    Rule("model.shared", "embedding.table"),
    *bart_block("model.encoder.layers.{layer}.", ENCODER),
    *bart_block("model.decoder.layers.{decoder_layer}.", DECODER),
    Rule("final_logits_bias", "head.bias", Row(), tensors=True, optional=True),
    Rule("lm_head", "head"),
    Rule("model.encoder.embed_tokens", "embedding.table"),
    Rule("model.decoder.embed_tokens", "embedding.table"),
)
BART_FIELDS: dict[str, Field | str] = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "d_ff",
    "max_position_embeddings": "context_length",
    "scale_embedding": Field("scaled_embeddings", default=False),
    "activation_function": Field("feedforward", {**ACTIVATIONS, **SILU}, "gelu"),
}
BART_FIXED = {"residual": "post", "norm": "layer", "norm_eps": 1e-5, "bias": True, "head_bias": True}


class BARTFamily(Family, name="bart"):
    """Lewis et al. 2019 (arXiv 1910.13461). Its positions start at 2."""

    architectures = {"encoder-decoder": "BartForConditionalGeneration"}
    fields = BART_FIELDS
    fixed = {**BART_FIXED, "positions": "learned", "embedding_norm": True}
    required = {"tie_word_embeddings": True}
    prefix = "model."
    rules = (
        *BART_RULES,
        Rule("model.encoder.embed_positions", "encoder.positions.table", WithoutFirst(2)),
        Rule("model.decoder.embed_positions", "decoder.positions.table", WithoutFirst(2)),
        Rule("model.encoder.layernorm_embedding", "encoder.embedding_norm"),
        Rule("model.decoder.layernorm_embedding", "decoder.embedding_norm"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        for name in ("attention_heads", "ffn_dim"):
            encoder, decoder = hf[f"encoder_{name}"], hf[f"decoder_{name}"]
            if encoder != decoder:
                raise UserError(
                    f"encoder_{name} is {encoder} and decoder_{name} {decoder} in config.json: "
                    "only equal ones are known"
                )
        return {}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {
            "is_encoder_decoder": True,
            "decoder_attention_heads": config.num_heads,
            "decoder_ffn_dim": config.d_ff or 4 * config.d_model,
        }


class MarianFamily(BARTFamily, name="marian"):
    """Junczys-Dowmunt et al. 2018 (arXiv 1804.00344): the models of OPUS-MT."""

    architectures = {"encoder-decoder": "MarianMTModel"}
    fixed = {**BART_FIXED, "positions": "sinusoidal-halves"}
    required = {"tie_word_embeddings": True, "share_encoder_decoder_embeddings": True}
    rules = BART_RULES
    ignored = (r"^model\.(en|de)coder\.embed_positions\.weight$",)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        # Marian's last token is its padding token, which starts decoding.
        assert config.vocab_size is not None
        padding = config.vocab_size - 1
        return {**super().write(config), "pad_token_id": padding, "decoder_start_token_id": padding}


class PegasusFamily(BARTFamily, name="pegasus"):
    """Zhang et al. 2019 (arXiv 1912.08777): Pre-LN."""

    architectures = {"encoder-decoder": "PegasusForConditionalGeneration"}
    fixed = {**BART_FIXED, "residual": "pre", "positions": "sinusoidal-halves"}
    rules = (
        *BART_RULES,
        Rule("model.encoder.layer_norm", "encoder.final_norm"),
        Rule("model.decoder.layer_norm", "decoder.final_norm"),
    )
    ignored = MarianFamily.ignored
