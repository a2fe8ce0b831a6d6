"""Encoders and encoder-decoders of llama.cpp: the metadata and the tensors of their GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from minitransformer.architecture.feedforward import GatedFeedForward
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.bert import FIXED
from minitransformer.pretrained.families import HF, Field
from minitransformer.pretrained.gguf_families import BLOCK, BY_TABLE, HAS_HEAD, LAYER_NORM, SHAPE, THEIRS, GGUFFamily
from minitransformer.pretrained.rules import Rule, Transform
from minitransformer.pretrained.seq2seq import DECODER, ENCODER, T5Family

CLASSES, SEGMENTS = "classifier.output_labels", "tokenizer.ggml.token_type_count"
HAS_SEGMENTS, HAS_CLASSES, HAS_GATE, SCALE = "has_segments", "has_classes", "has_gate", "logit_scale"
POOLING, RANK = "pooling_type", 4
"""how a file says that it pools hidden states, and what it says where it pools classes"""
POOLINGS = {"mean": 1, "first": 2, "last": 3}
ATTENTION = {"attn_q": "query", "attn_k": "key", "attn_v": "value"}


class EncoderGGUF(GGUFFamily):
    """An encoder: hidden states or classes, without a head for masked tokens."""

    # Of a head for masked tokens, llama.cpp's own converter writes the first part.
    ignored: ClassVar[Sequence[str]] = (r"^cls\.(weight|bias|norm\.weight)$",)

    @classmethod
    def model_config(cls, hf: HF) -> ModelConfig:
        return super().model_config({"id2label": hf.get(CLASSES, ["0"]), **hf})

    @classmethod
    def _topology(cls, hf: HF) -> str:
        return "encoder-classifier" if hf[HAS_CLASSES] else "encoder-headless"

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"attention.causal": False, HAS_CLASSES: config.topology == "encoder-classifier"}


class BERTGGUF(EncoderGGUF, name="bert"):
    """BERT, RoBERTa, XLM-RoBERTa and DistilBERT.

    llama.cpp computes GELU by its tanh approximation, whatever a file says.
    """

    architectures: ClassVar[dict[str, str]] = {"encoder-headless": "bert", "encoder-classifier": "bert"}
    tolerance = BY_TABLE
    present: ClassVar[dict[str, str]] = {HAS_SEGMENTS: "token_types.weight", HAS_CLASSES: "cls.output.weight"}
    fields: ClassVar[dict[str, Field | str]] = {
        **SHAPE,
        **{name: replace(field, default=1e-12) for name, field in LAYER_NORM.items()},
        "hidden_activation": Field("feedforward", {"gelu": "gelu", "gelu_pytorch_tanh": "gelu-tanh"}, "gelu"),
    }
    fixed: ClassVar[dict[str, Any]] = FIXED
    rules = (
        Rule("token_embd", "embedding.table"),
        Rule("token_types", "embedding.segments"),
        Rule("position_embd", "stack.positions.table"),
        Rule("token_embd_norm", "stack.embedding_norm"),
        *(Rule(THEIRS + theirs, f"{BLOCK}attention.{ours}") for theirs, ours in ATTENTION.items()),
        Rule(THEIRS + "attn_output", BLOCK + "attention.output"),
        Rule(THEIRS + "attn_output_norm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "ffn_up", BLOCK + "feedforward.up"),
        Rule(THEIRS + "ffn_down", BLOCK + "feedforward.down"),
        Rule(THEIRS + "layer_output_norm", BLOCK + "feedforward_residual.norm"),
        Rule("cls", "head.pool"),
        Rule("cls.output", "head.classify"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"num_segments": hf.get(SEGMENTS, 1) if hf[HAS_SEGMENTS] else None}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        segments = config.num_segments
        return {**super().write(config), SEGMENTS: segments or 1, HAS_SEGMENTS: segments is not None}


@dataclass(frozen=True)
class Scaled(Transform):
    """Weights that take in the `factor` by which we multiply what comes out of them, as the runtime has none."""

    factor: Callable[[ModelConfig], float]

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor / self.factor(config),)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0] * self.factor(config)


OF_SCORES = Scaled(lambda config: config.attention_scale or config.features_per_head**-0.5)
OF_LOGITS = Scaled(lambda config: config.logit_scale)


def t5_tensors(side: str, ours: str) -> Iterator[Rule]:
    """The rules of the blocks of the encoder, or of the decoder, whose names begin with `side`."""
    attentions = {"attn": "attention", **({"cross_attn": "cross_attention"} if side == "dec" else {})}
    theirs = f"{side}.blk.{{{'decoder_layer' if side == 'dec' else 'layer'}}}."
    for name, attention in attentions.items():
        yield Rule(f"{theirs}{name}_norm", f"{ours}{attention}_residual.norm")
        yield Rule(f"{theirs}{name}_q", f"{ours}{attention}.query", OF_SCORES)
        for letter, part in {"k": "key", "v": "value", "o": "output"}.items():
            yield Rule(f"{theirs}{name}_{letter}", f"{ours}{attention}.{part}")
    yield Rule(f"{theirs}ffn_norm", f"{ours}feedforward_residual.norm")
    for part in ("gate", "up", "down"):
        yield Rule(f"{theirs}ffn_{part}", f"{ours}feedforward.{part}")


class T5GGUF(GGUFFamily, name="t5"):
    """T5 1.0 and 1.1, and mT5. Nothing scales scores or logits there: the queries and the last norm take that in."""

    architectures: ClassVar[dict[str, str]] = {"encoder-decoder": "t5"}
    present: ClassVar[dict[str, str]] = {HAS_HEAD: "output.weight", HAS_GATE: "dec.blk.0.ffn_gate.weight"}
    fields: ClassVar[dict[str, Field | str]] = {
        **SHAPE,
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": Field("norm_eps", default=1e-6),
        "attention.relative_buckets_count": Field("t5_buckets", default=32),
        "decoder_block_count": Field("num_decoder_layers", nullable=True),
        "attention.scale": Field("attention_scale", default=1.0),
    }
    fixed: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in T5Family.fixed.items() if name != "attention_scale"},
        "t5_max_distance": 128,
    }
    rules = (
        Rule("token_embd", "embedding.table"),
        Rule("enc.blk.0.attn_rel_b", "encoder.positions.table"),
        Rule("dec.blk.0.attn_rel_b", "decoder.positions.table"),
        *t5_tensors("enc", ENCODER),
        *t5_tensors("dec", DECODER),
        Rule("enc.output_norm", "encoder.final_norm"),
        Rule("dec.output_norm", "decoder.final_norm", OF_LOGITS),
        Rule("output", "head"),
    )
    # Published files have this table, which nothing uses.
    ignored: ClassVar[Sequence[str]] = (r"cross_attn_rel_b",)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        usual = 1.0 if hf[HAS_HEAD] else hf["embedding_length"] ** -0.5
        return {
            "feedforward": "geglu-tanh" if hf[HAS_GATE] else "relu",
            "tied_embeddings": not hf[HAS_HEAD],
            "logit_scale": hf.get(SCALE, usual),
        }

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {
            "attention.value_length": config.features_per_head,
            "attention.layer_norm_epsilon": config.norm.settings.eps,
            HAS_GATE: issubclass(config.feedforward.variant, GatedFeedForward),
            HAS_HEAD: not config.tied_embeddings,
            SCALE: config.logit_scale,
        }

    @classmethod
    def tolerance_for(cls, config: ModelConfig) -> float:
        """Nothing scales the scores of attention, which the rounding of GELU moves the more."""
        return cls.tolerance if config.feedforward.name == "relu" else 4 * BY_TABLE

    @classmethod
    def factors(cls, metadata: HF) -> dict[str, float]:
        """llama.cpp's own converter leaves the scale of a tied head out."""
        width = metadata.get("embedding_length")
        if SCALE in metadata or metadata[HAS_HEAD] or not isinstance(width, int) or width < 1:
            return {}
        return {"dec.output_norm.weight": width**-0.5}
