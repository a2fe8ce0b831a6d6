"""Architectures of llama.cpp: the metadata and the tensors of GGUF files, as tables like those of families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import HF, Family, Field, Obstacle
from minitransformer.pretrained.gguf_rope import (
    DIVISORS,
    LONG,
    SHORT,
    in_factors,
    read_gguf_windows,
    read_rotary,
    write_gguf_windows,
    write_rotary,
)
from minitransformer.pretrained.rules import Halves, InterleavedHeads, InterleavedPairs, Rule, StackedHeads, Transform

BLOCK = "stack.blocks.{layer}."
THEIRS = "blk.{layer}."
QKV = (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value")
BY_TABLE = 5e-3
"""largest error of logits where llama.cpp looks GELU up in a table of 16 bits"""
HAS_HEAD = "has_head"
"""whether the file has an output matrix of its own"""


class Stacked(Transform):
    """One above the other in a new dimension: the matrices of experts, the gains of heads."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return tensor.unbind()

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.stack(weights)


class GGUFFamily(Family, kind="architecture of GGUF"):
    """An architecture of llama.cpp. `fields` are keys of the metadata, without the name of the architecture."""

    file = "the metadata"
    tolerance = 2e-4
    """largest error of llama.cpp's logits, of their root mean square"""
    present: ClassVar[dict[str, str]] = {HAS_HEAD: "output.weight"}
    """what stands among the metadata for whether the file has a tensor"""

    @classmethod
    def tolerance_for(cls, config: ModelConfig) -> float:
        """The largest error of this member's outputs."""
        return cls.tolerance

    @classmethod
    def factors(cls, metadata: HF) -> dict[str, float]:
        """What tensors of this file are to be multiplied by, as another program has written them in another way."""
        return {}


SHAPE: dict[str, Field | str] = {
    "vocab_size": "vocab_size",
    "context_length": "context_length",
    "embedding_length": "d_model",
    "block_count": "num_layers",
    "feed_forward_length": "d_ff",
    "attention.head_count": "num_heads",
}
GROUPED = {**SHAPE, "attention.head_count_kv": Field("num_kv_heads", nullable=True)}
RMS = {**GROUPED, "attention.layer_norm_rms_epsilon": Field("norm_eps", default=1e-6)}
LAYER_NORM = {"attention.layer_norm_epsilon": Field("norm_eps", default=1e-5)}
PARTLY_ROTARY = {"residual": "pre", "norm": "rms", "positions": "rotary", "bias": False, "feedforward": "swiglu"}
ROTARY = {**PARTLY_ROTARY, "rotary_fraction": 1.0}
OUTSIDE = (
    Rule("token_embd", "embedding.table"),
    Rule("output_norm", "stack.final_norm"),
    Rule("output", "head"),
)
PRE_LN = (
    Rule(THEIRS + "attn_norm", BLOCK + "attention_residual.norm"),
    Rule(THEIRS + "ffn_norm", BLOCK + "feedforward_residual.norm"),
)
FEEDFORWARD = tuple(Rule(f"{THEIRS}ffn_{name}", f"{BLOCK}feedforward.{name}") for name in ("gate", "up", "down"))
FUSED = (
    Rule(THEIRS + "attn_qkv", QKV, StackedHeads()),
    Rule(THEIRS + "attn_output", BLOCK + "attention.output"),
)
NORMED_HEADS = (
    Rule(THEIRS + "attn_q_norm", BLOCK + "attention.query_norm.norm"),
    Rule(THEIRS + "attn_k_norm", BLOCK + "attention.key_norm.norm"),
)


def attention_tensors(transform: Transform | None = None) -> tuple[Rule, ...]:
    """Queries, keys, values and output; `transform` is that of queries and keys."""
    same = Rule(THEIRS + "attn_v", BLOCK + "attention.value"), Rule(THEIRS + "attn_output", BLOCK + "attention.output")
    names = {"attn_q": "query", "attn_k": "key"}
    return (
        *(
            Rule(THEIRS + theirs, f"{BLOCK}attention.{ours}", transform or Transform())
            for theirs, ours in names.items()
        ),
        *same,
    )


def expert_tensors(config: ModelConfig) -> tuple[Rule, ...]:
    """The router, and the matrices of all experts."""
    experts = range(config.num_experts or 0)
    return (
        Rule(THEIRS + "ffn_gate_inp", BLOCK + "feedforward.router"),
        *(
            Rule(
                f"{THEIRS}ffn_{name}_exps.weight",
                tuple(f"{BLOCK}feedforward.experts.{expert}.{name}.weight" for expert in experts),
                Stacked(),
                tensors=True,
            )
            for name in ("gate", "up", "down")
        ),
    )


def norms_of_heads(config: ModelConfig, transform: Transform) -> tuple[Rule, ...]:
    """The gains of every head's own norm of queries and of keys."""
    heads = {"query": config.num_heads, "key": config.num_kv_heads or config.num_heads}
    return tuple(
        Rule(
            f"{THEIRS}attn_{name[0]}_norm",
            tuple(f"{BLOCK}attention.{name}_norm.norms.{head}" for head in range(count)),
            transform,
        )
        for name, count in heads.items()
    )


class RotaryGGUF(GGUFFamily):
    """An architecture with rotary positions."""

    fields = RMS
    fixed = ROTARY
    ignored = tuple(f"^{name}$" for name in DIVISORS)
    divisors: ClassVar[tuple[str, ...]] = ()
    """the tensors with divisors of frequencies that llama.cpp reads"""
    has_head_dim = True
    """whether heads may be wider or narrower than all of them together divided by their number"""

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        tied = {"tied_embeddings": not hf.get(HAS_HEAD, True)}
        return {**read_rotary(hf), **tied, **({} if cls.has_head_dim else {"head_dim": None})}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**write_rotary(config, cls.divisors), HAS_HEAD: not config.tied_embeddings}

    @classmethod
    def compared(cls, config: ModelConfig) -> tuple[list[Obstacle], dict[str, bool]]:
        return super().compared(in_factors(config) if cls.divisors else config)

    @classmethod
    def _written(cls, config: ModelConfig) -> HF:
        return super()._written(in_factors(config) if cls.divisors else config)


class LlamaGGUF(RotaryGGUF, name="llama"):
    """Llama, Mistral without its window, and Mixtral, with queries and keys in interleaved pairs."""

    architectures = {"decoder": "llama"}
    divisors = DIVISORS

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        mixture = expert_tensors(config) if config.num_experts else FEEDFORWARD
        return (*OUTSIDE, *PRE_LN, *attention_tensors(InterleavedPairs()), *mixture)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        experts = hf.get("expert_count") or None
        used = {"num_experts": experts, "experts_per_token": hf.get("expert_used_count", 2)} if experts else {}
        return {**super().read(hf), **used}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        used = {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
        return {**super().write(config), **(used if config.num_experts else {})}


class Qwen2GGUF(RotaryGGUF, name="qwen2"):
    """Qwen 2, with biases of queries, keys and values."""

    architectures = {"decoder": "qwen2"}
    fixed = {**ROTARY, "qkv_bias": True}
    rules = (*OUTSIDE, *PRE_LN, *attention_tensors(), *FEEDFORWARD)


class Qwen3GGUF(RotaryGGUF, name="qwen3"):
    """Qwen 3, with a norm of each head's queries and keys."""

    architectures = {"decoder": "qwen3"}
    fixed = {**ROTARY, "qk_norm": "head"}
    rules = (*Qwen2GGUF.rules, *NORMED_HEADS)


class Qwen3MoEGGUF(RotaryGGUF, name="qwen3moe"):
    """Qwen 3 with experts."""

    architectures = {"decoder": "qwen3moe"}
    fields = {
        **{key: field for key, field in RMS.items() if key != "feed_forward_length"},
        "expert_feed_forward_length": "d_ff",
        "expert_count": Field("num_experts", default=128),
        "expert_used_count": Field("experts_per_token", default=8),
    }
    fixed = Qwen3GGUF.fixed

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        return (*OUTSIDE, *PRE_LN, *attention_tensors(), *NORMED_HEADS, *expert_tensors(config))


class OLMo2GGUF(RotaryGGUF, name="olmo2"):
    """OLMo 2 and 3: norms after the sublayers, and in OLMo 3 windows, which scalings leave alone."""

    architectures = {"decoder": "olmo2"}
    fixed = {**ROTARY, "residual": "olmo2", "qk_norm": "full", "tied_embeddings": False}
    has_head_dim = False
    rules = (
        *OUTSIDE,
        *attention_tensors(),
        *FEEDFORWARD,
        Rule(THEIRS + "post_attention_norm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "post_ffw_norm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "attn_q_norm", BLOCK + "attention.query_norm"),
        Rule(THEIRS + "attn_k_norm", BLOCK + "attention.key_norm"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        rotary, windows = super().read(hf), read_gguf_windows(hf, every=4)
        return {**rotary, **windows, "rotary_window_base": rotary["rotary_base"] if len(windows) > 1 else None}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), **write_gguf_windows(config)}


class GraniteGGUF(RotaryGGUF, name="granite"):
    """Granite 3: Llama with constant factors of embeddings, scores, sublayers and logits."""

    architectures = {"decoder": "granite"}
    fields = {
        **RMS,
        "embedding_scale": Field("embedding_scale", default=1.0),
        "residual_scale": Field("pre_scaled_multiplier", default=1.0),
        "attention.scale": Field("attention_scale"),
    }
    fixed = {**ROTARY, "residual": "pre-scaled"}
    required = {"rope.scaling.finetuned": True}
    divisors = DIVISORS
    rules = (*OUTSIDE, *PRE_LN, *attention_tensors(InterleavedPairs()), *FEEDFORWARD)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "logit_scale": 1 / hf["logit_scale"]}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), "logit_scale": 1 / config.logit_scale}


class SmolLM3GGUF(RotaryGGUF, name="smollm3"):
    """SmolLM3: Llama, without rotation in every fourth layer."""

    architectures = {"decoder": "smollm3"}
    rules = GraniteGGUF.rules

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "rotary_layers": tuple((layer + 1) % 4 > 0 for layer in range(hf["block_count"]))}


class Phi3GGUF(RotaryGGUF, name="phi3"):
    """Phi-3 and Phi-4, with matrices side by side; llama.cpp ignores the window that a file may have."""

    architectures = {"decoder": "phi3"}
    fixed = PARTLY_ROTARY
    divisors = (SHORT, LONG)
    has_head_dim = False
    rules = (
        *OUTSIDE,
        *PRE_LN,
        *FUSED,
        Rule(THEIRS + "ffn_up", (BLOCK + "feedforward.gate", BLOCK + "feedforward.up"), Halves()),
        Rule(THEIRS + "ffn_down", BLOCK + "feedforward.down"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "attention_window": hf.get("attention.sliding_window") or None}


class StableLMGGUF(RotaryGGUF, name="stablelm"):
    """StableLM: LayerNorm, and a fraction of each head rotated; what a member has is said by its tensors alone."""

    architectures = {"decoder": "stablelm"}
    fields = {**GROUPED, **LAYER_NORM}
    fixed = {**PARTLY_ROTARY, "norm": "layer", "norm_bias": True, "tied_embeddings": False}
    has_head_dim = False
    present = {
        **GGUFFamily.present,
        "has_two_norms": "blk.0.ffn_norm.weight",
        "has_qk_norm": "blk.0.attn_q_norm.weight",
        "has_qkv_bias": "blk.0.attn_q.bias",
    }

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        parallel = Rule(THEIRS + "attn_norm", BLOCK + "residual.norm")
        return (*Qwen2GGUF.rules, parallel, *norms_of_heads(config, Stacked()))

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {
            **super().read(hf),
            "block": "sequential" if hf["has_two_norms"] else "parallel",
            "qk_norm": "each-head" if hf["has_qk_norm"] else "none",
            "qkv_bias": hf["has_qkv_bias"],
        }

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {
            **super().write(config),
            "use_parallel_residual": config.block.name == "parallel",
            "has_two_norms": config.block.name == "sequential",
            "has_qk_norm": config.qk_norm == "each-head",
            "has_qkv_bias": bool(config.qkv_bias),
        }


class CommandRGGUF(RotaryGGUF, name="command-r"):
    """Cohere's Command R: parallel blocks; each head's own norm of queries and keys from 64 layers on."""

    architectures = {"decoder": "command-r"}
    fields = {**GROUPED, **LAYER_NORM, "logit_scale": Field("logit_scale", default=1.0)}
    fixed = {**ROTARY, "norm": "layer", "block": "parallel", "tied_embeddings": True}
    has_head_dim = False

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        return (
            *OUTSIDE,
            Rule(THEIRS + "attn_norm", BLOCK + "residual.norm"),
            *attention_tensors(InterleavedPairs()),
            *FEEDFORWARD,
            *norms_of_heads(config, InterleavedHeads()),
        )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "qk_norm": "each-head" if hf["block_count"] >= 64 else "none"}


class DBRXGGUF(RotaryGGUF, name="dbrx"):
    """DBRX, a mixture of experts."""

    architectures = {"decoder": "dbrx"}
    fields = {
        **GROUPED,
        **LAYER_NORM,
        "expert_count": Field("num_experts", default=16),
        "expert_used_count": Field("experts_per_token", default=4),
    }
    fixed = {**ROTARY, "norm": "layer", "tied_embeddings": False}
    has_head_dim = False

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        norms = (PRE_LN[0], Rule(THEIRS + "attn_output_norm", BLOCK + "feedforward_residual.norm"))
        return (*OUTSIDE, *norms, *FUSED, *expert_tensors(config))

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "qkv_clip": hf.get("attention.clamp_kqv") or None}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), "attention.clamp_kqv": config.qkv_clip or 0.0}
