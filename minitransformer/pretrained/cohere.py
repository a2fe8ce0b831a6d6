"""Cohere's Command R and R+."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, Field
from minitransformer.pretrained.llama import (
    BLOCK,
    GROUPED_SHAPE,
    OUTSIDE,
    THEIRS,
    LlamaFamily,
    feedforward_rules,
    read_attention_bias,
)
from minitransformer.pretrained.rope import read_rope
from minitransformer.pretrained.rules import InterleavedHeads, InterleavedPairs, Rule


class CohereFamily(LlamaFamily, name="cohere"):
    """Command R (Cohere 2024), its public code: parallel blocks, and R+ with gains for each head's QK-norm."""

    architectures = {"decoder": "CohereForCausalLM"}
    fields = {
        **GROUPED_SHAPE,
        "layer_norm_eps": Field("norm_eps", default=1e-5),
        "hidden_act": Field("feedforward", GATED, "silu"),
        "logit_scale": Field("logit_scale", default=0.0625),
        "use_qk_norm": Field("qk_norm", {True: "each-head", False: "none"}, False),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {"residual": "pre", "norm": "layer", "block": "parallel", "positions": "rotary", "bias": False}

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        heads = {"query": config.num_heads, "key": config.num_kv_heads or config.num_heads}
        return (
            *OUTSIDE,
            Rule(THEIRS + "input_layernorm", BLOCK + "residual.norm"),
            Rule(THEIRS + "self_attn.q_proj", BLOCK + "attention.query", InterleavedPairs()),
            Rule(THEIRS + "self_attn.k_proj", BLOCK + "attention.key", InterleavedPairs()),
            Rule(THEIRS + "self_attn.v_proj", BLOCK + "attention.value"),
            Rule(THEIRS + "self_attn.o_proj", BLOCK + "attention.output"),
            *feedforward_rules(),
            *(
                Rule(
                    f"{THEIRS}self_attn.{name[0]}_norm",
                    tuple(f"{BLOCK}attention.{name}_norm.norms.{head}" for head in range(count)),
                    InterleavedHeads(),
                )
                for name, count in heads.items()
            ),
        )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**read_rope(hf, default_base=5e5), **read_attention_bias(hf)}
