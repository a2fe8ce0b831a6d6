"""Architectures of llama.cpp: the metadata and the tensors of GGUF files, as tables like those of families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import HF, Family, Field
from minitransformer.pretrained.rules import InterleavedPairs, Rule, Transform

BLOCK = "stack.blocks.{layer}."
THEIRS = "blk.{layer}."
BY_TABLE = 5e-3
"""largest error of logits where llama.cpp looks GELU up in a table of 16 bits"""
HAS_HEAD = "has_head"
"""whether the file has an output matrix of its own"""


class OnePlus(Transform):
    """A norm weight w is stored as 1 + w: Gemma."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor - 1,)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0] + 1


class Concatenated(Transform):
    """Queries, keys and values below one another."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        heads, shared = config.num_heads, config.num_kv_heads or config.num_heads
        return tensor.split([count * config.features_per_head for count in (heads, shared, shared)])

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat(weights)


class Stacked(Transform):
    """The matrices of all experts, one above the other in a new dimension."""

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
ROTARY = {"residual": "pre", "norm": "rms", "positions": "rotary", "bias": False, "feedforward": "swiglu"}
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


def read_rotary(metadata: HF) -> dict[str, Any]:
    """Rotary settings, and whether the head is tied."""
    heads = metadata["attention.head_count"]
    width = metadata.get("attention.key_length") or metadata["embedding_length"] // heads
    turned = metadata.get("rope.dimension_count") or width
    return {
        "head_dim": width,
        "rotary_base": float(metadata.get("rope.freq_base", 10000.0)),
        "rotary_fraction": turned / width,
        "tied_embeddings": not metadata.get(HAS_HEAD, True),
    }


def write_rotary(config: ModelConfig) -> HF:
    """The inverse of `read_rotary`."""
    width, rotary = config.features_per_head, config.positions.settings
    return {
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * rotary.fraction),
        "rope.freq_base": rotary.base,
        HAS_HEAD: not config.tied_embeddings,
    }


class LlamaGGUF(GGUFFamily, name="llama"):
    """Llama, Mistral without its window, and Mixtral, with queries and keys in interleaved pairs."""

    architectures = {"decoder": "llama"}
    fields = RMS
    fixed = ROTARY

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        experts = range(config.num_experts or 0)
        stacked = tuple(
            Rule(
                f"{THEIRS}ffn_{name}_exps.weight",
                tuple(f"{BLOCK}feedforward.experts.{expert}.{name}.weight" for expert in experts),
                Stacked(),
                tensors=True,
            )
            for name in ("gate", "up", "down")
        )
        mixture = (Rule(THEIRS + "ffn_gate_inp", BLOCK + "feedforward.router"), *stacked)
        return (*OUTSIDE, *PRE_LN, *attention_tensors(InterleavedPairs()), *(mixture if experts else FEEDFORWARD))

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        experts = hf.get("expert_count") or None
        used = {"num_experts": experts, "experts_per_token": hf.get("expert_used_count", 2)} if experts else {}
        return {**read_rotary(hf), **used}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        used = {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
        return {**write_rotary(config), **(used if config.num_experts else {})}


class Qwen2GGUF(GGUFFamily, name="qwen2"):
    """Qwen 2, with biases of queries, keys and values."""

    architectures = {"decoder": "qwen2"}
    fields = RMS
    fixed = {**ROTARY, "qkv_bias": True}
    rules = (*OUTSIDE, *PRE_LN, *attention_tensors(), *FEEDFORWARD)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_rotary(hf)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_rotary(config)


class Qwen3GGUF(Qwen2GGUF, name="qwen3"):
    """Qwen 3, with a norm of each head's queries and keys."""

    architectures = {"decoder": "qwen3"}
    fixed = {**ROTARY, "qk_norm": "head"}
    rules = (
        *Qwen2GGUF.rules,
        Rule(THEIRS + "attn_q_norm", BLOCK + "attention.query_norm.norm"),
        Rule(THEIRS + "attn_k_norm", BLOCK + "attention.key_norm.norm"),
    )


class OLMo2GGUF(Qwen2GGUF, name="olmo2"):
    """OLMo 2: norms after the sublayers."""

    architectures = {"decoder": "olmo2"}
    fixed = {**ROTARY, "residual": "olmo2", "qk_norm": "full", "tied_embeddings": False}
    rules = (
        *OUTSIDE,
        *attention_tensors(),
        *FEEDFORWARD,
        Rule(THEIRS + "post_attention_norm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "post_ffw_norm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "attn_q_norm", BLOCK + "attention.query_norm"),
        Rule(THEIRS + "attn_k_norm", BLOCK + "attention.key_norm"),
    )


class Gemma2GGUF(GGUFFamily, name="gemma2"):
    """Gemma 2, whose layers alternate between a window and full attention."""

    architectures = {"decoder": "gemma2"}
    tolerance = BY_TABLE
    fields = {
        **RMS,
        "attn_logit_softcapping": Field("attention_softcap", default=50.0),
        "final_logit_softcapping": Field("logit_softcap", default=30.0),
        "attention.sliding_window": Field("attention_window", default=4096),
    }
    fixed = {
        **ROTARY,
        "residual": "sandwich",
        "norm": "rms-zero-centred",
        "scaled_embeddings": True,
        "tied_embeddings": True,
        "feedforward": "geglu-tanh",
    }
    rules = (
        *(Rule(rule.source, rule.target, OnePlus()) if "norm" in rule.source else rule for rule in OUTSIDE),
        *attention_tensors(),
        *FEEDFORWARD,
        Rule(THEIRS + "attn_norm", BLOCK + "attention_residual.norm", OnePlus()),
        Rule(THEIRS + "post_attention_norm", BLOCK + "attention_residual.output_norm", OnePlus()),
        Rule(THEIRS + "ffn_norm", BLOCK + "feedforward_residual.norm", OnePlus()),
        Rule(THEIRS + "post_ffw_norm", BLOCK + "feedforward_residual.output_norm", OnePlus()),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        windows = tuple(layer % 2 == 0 for layer in range(hf["block_count"]))
        return {**read_rotary(hf), "tied_embeddings": True, "window_pattern": windows}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_rotary(config)


class StableLMGGUF(GGUFFamily, name="stablelm"):
    """StableLM: LayerNorm, and a fraction of each head rotated."""

    architectures = {"decoder": "stablelm"}
    fields = {**GROUPED, **LAYER_NORM}
    fixed = {**ROTARY, "norm": "layer", "norm_bias": True, "qkv_bias": False, "tied_embeddings": False}
    rules = (*OUTSIDE, *PRE_LN, *attention_tensors(), *FEEDFORWARD)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_rotary(hf)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**write_rotary(config), "use_parallel_residual": False}


class GPT2GGUF(GGUFFamily, name="gpt2"):
    """GPT-2."""

    architectures = {"decoder": "gpt2"}
    tolerance = BY_TABLE
    fields = {**SHAPE, **LAYER_NORM}
    fixed = {"residual": "pre", "norm": "layer", "positions": "learned", "bias": True, "feedforward": "gelu-tanh"}
    rules = (
        *OUTSIDE,
        *PRE_LN,
        Rule("position_embd", "stack.positions.table"),
        Rule(
            THEIRS + "attn_qkv",
            (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value"),
            Concatenated(),
        ),
        Rule(THEIRS + "attn_output", BLOCK + "attention.output"),
        Rule(THEIRS + "ffn_up", BLOCK + "feedforward.up"),
        Rule(THEIRS + "ffn_down", BLOCK + "feedforward.down"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"tied_embeddings": not hf.get(HAS_HEAD, True)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {HAS_HEAD: not config.tied_embeddings}
