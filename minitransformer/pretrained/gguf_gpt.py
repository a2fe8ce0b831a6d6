"""GPT-2, GPT-NeoX, Bloom and Falcon in GGUF files."""

from __future__ import annotations

from typing import Any

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import HF, Field
from minitransformer.pretrained.gguf_families import (
    BLOCK,
    BY_TABLE,
    FUSED,
    GROUPED,
    HAS_HEAD,
    LAYER_NORM,
    OUTSIDE,
    PARTLY_ROTARY,
    PRE_LN,
    ROTARY,
    SHAPE,
    THEIRS,
    GGUFFamily,
    RotaryGGUF,
)
from minitransformer.pretrained.rules import Rule

FEEDFORWARD = tuple(Rule(f"{THEIRS}ffn_{name}", f"{BLOCK}feedforward.{name}") for name in ("up", "down"))


class GPT2GGUF(GGUFFamily, name="gpt2"):
    """GPT-2."""

    architectures = {"decoder": "gpt2"}
    tolerance = BY_TABLE
    fields = {**SHAPE, **LAYER_NORM}
    fixed = {"residual": "pre", "norm": "layer", "positions": "learned", "bias": True, "feedforward": "gelu-tanh"}
    rules = (
        *OUTSIDE,
        Rule("position_embd", "stack.positions.table"),
        *PRE_LN,
        *FUSED,
        *FEEDFORWARD,
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"tied_embeddings": not hf.get(HAS_HEAD, True)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {HAS_HEAD: not config.tied_embeddings}


class BloomGGUF(GPT2GGUF, name="bloom"):
    """Bloom: ALiBi, and a norm of the embeddings."""

    architectures = {"decoder": "bloom"}
    fields = {**GROUPED, **LAYER_NORM}
    fixed = {**GPT2GGUF.fixed, "positions": "alibi", "embedding_norm": True}
    rules = (*OUTSIDE, Rule("token_embd_norm", "stack.embedding_norm"), *PRE_LN, *FUSED, *FEEDFORWARD)


class GPTNeoXGGUF(RotaryGGUF, name="gptneox"):
    """GPT-NeoX and Pythia."""

    architectures = {"decoder": "gptneox"}
    tolerance = BY_TABLE
    fields = {
        **GROUPED,
        **LAYER_NORM,
        "use_parallel_residual": Field("block", {True: "parallel-two-norms", False: "sequential"}, True),
    }
    fixed = {**PARTLY_ROTARY, "norm": "layer", "bias": True, "feedforward": "gelu", "tied_embeddings": False}
    has_head_dim = False
    rules = (
        *OUTSIDE,
        *PRE_LN,
        Rule(THEIRS + "attn_norm", BLOCK + "residual.norm"),
        Rule(THEIRS + "ffn_norm", BLOCK + "feedforward_norm"),
        *FUSED,
        *FEEDFORWARD,
    )


class FalconGGUF(RotaryGGUF, name="falcon"):
    """Falcon with rotary positions: the norm of attention has a tensor of its own where there are two."""

    architectures = {"decoder": "falcon"}
    tolerance = BY_TABLE
    fields = {**GROUPED, **LAYER_NORM}
    fixed = {**ROTARY, "norm": "layer", "norm_bias": True, "feedforward": "gelu"}
    has_head_dim = False
    present = {**GGUFFamily.present, "has_two_norms": "blk.0.attn_norm_2.weight"}

    @classmethod
    def rules_for(cls, config: ModelConfig) -> tuple[Rule, ...]:
        two = config.block.name == "parallel-two-norms"
        return (
            *OUTSIDE,
            Rule(THEIRS + ("attn_norm_2" if two else "attn_norm"), BLOCK + "residual.norm"),
            Rule(THEIRS + "attn_norm", BLOCK + "feedforward_norm"),
            *FUSED,
            *FEEDFORWARD,
        )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        two = hf["has_two_norms"]
        return {**super().read(hf), "block": "parallel-two-norms" if two else "parallel"}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), "has_two_norms": config.block.name == "parallel-two-norms"}
