"""ModernBERT in GGUF files."""

from __future__ import annotations

from typing import Any, ClassVar

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import HF, Field
from minitransformer.pretrained.gguf_encoders import HAS_CLASSES, POOLINGS, EncoderGGUF
from minitransformer.pretrained.gguf_families import BLOCK, BY_TABLE, LAYER_NORM, PRE_LN, SHAPE, THEIRS
from minitransformer.pretrained.modernbert import ModernBERTFamily
from minitransformer.pretrained.rules import Halves, Rule, StackedHeads

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
BASE, WINDOW_BASE, CLASS_POOLING = "rope.freq_base", "rope.freq_base_swa", "classifier.pooling_type"
OF_GATES = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu-tanh", "silu": "swiglu", "reglu": "reglu"}
EVERY = 3
"""of so many layers the first has no window, where a file does not say so"""


class ModernBERTGGUF(EncoderGGUF, name="modern-bert"):
    """ModernBERT: hidden states or classes. A window of 2w tokens reaches w to either side."""

    architectures: ClassVar[dict[str, str]] = {"encoder-headless": "modern-bert", "encoder-classifier": "modern-bert"}
    tolerance = BY_TABLE
    present: ClassVar[dict[str, str]] = {HAS_CLASSES: "cls.output.weight"}
    fields: ClassVar[dict[str, Field | str]] = {
        **SHAPE,
        **LAYER_NORM,
        "hidden_activation": Field("feedforward", OF_GATES, "gelu"),
        CLASS_POOLING: Field("pooled", {number: name for name, number in POOLINGS.items()}, POOLINGS["mean"]),
    }
    fixed: ClassVar[dict[str, Any]] = {
        **ModernBERTFamily.fixed,
        **{"bias": False, "norm_bias": False, "qkv_bias": False, "attention_output_bias": False},
        **{"rotary_fraction": 1.0, "pooling": "gelu", "transform_bias": False},
    }
    rules = (
        Rule("token_embd", "embedding.table"),
        Rule("token_embd_norm", "stack.embedding_norm"),
        *PRE_LN,
        Rule(
            THEIRS + "attn_qkv",
            (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value"),
            StackedHeads(),
        ),
        Rule(THEIRS + "attn_output", BLOCK + "attention.output"),
        Rule(THEIRS + "ffn_up", (BLOCK + "feedforward.gate", BLOCK + "feedforward.up"), Halves()),
        Rule(THEIRS + "ffn_down", BLOCK + "feedforward.down"),
        Rule("output_norm", "stack.final_norm"),
        Rule("cls", "head.pool"),
        Rule("cls.norm", "head.pool_norm"),
        Rule("cls.output", "head.classify"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        base, layers = float(hf.get(BASE, 10_000.0)), hf["block_count"]
        pattern, window = hf.get(PATTERN, EVERY), hf.get(WINDOW)
        sliding = pattern if isinstance(pattern, list) else [layer % pattern > 0 for layer in range(layers)]
        if not window or not any(sliding):
            return {"rotary_base": base}
        return {
            "rotary_base": base,
            "rotary_window_base": float(hf.get(WINDOW_BASE, base)),
            "attention_window": window // 2 + 1,
            "window_pattern": tuple(map(bool, sliding)),
        }

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        sliding = [config.window_of(layer) is not None for layer in range(config.num_layers)]
        rotary = config.positions.settings
        written = {**super().write(config), BASE: rotary.base}
        if any(sliding):
            local = rotary.base if rotary.window_base is None else rotary.window_base
            written |= {WINDOW_BASE: local, PATTERN: sliding, WINDOW: 2 * ((config.attention_window or 1) - 1)}
        return written
