"""Gemma 1, 2 and 3 (its text models)."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, Field
from minitransformer.pretrained.llama import (
    BLOCK,
    GROUPED_SHAPE,
    OUTSIDE,
    THEIRS,
    LlamaFamily,
    attention_rules,
    feedforward_rules,
    mostly_windows,
    read_attention_bias,
    read_windows,
    write_windows,
)
from minitransformer.pretrained.rope import read_rope, read_window_rope, write_rope, write_window_rope
from minitransformer.pretrained.rules import Rule

SHARED: dict[str, Field | str] = {
    **GROUPED_SHAPE,
    "head_dim": Field("head_dim", default=256),
    "rms_norm_eps": Field("norm_eps", default=1e-6),
    "tie_word_embeddings": Field("tied_embeddings", default=True),
}


class GemmaFamily(LlamaFamily, name="gemma"):
    """Gemma 1 (arXiv 2403.08295)."""

    architectures = {"decoder": "GemmaForCausalLM"}
    fields = {
        **SHARED,
        # What its first files call "gelu" was trained with tanh.
        "hidden_act": Field("feedforward", {**GATED, "gelu": "geglu-tanh"}, "gelu_pytorch_tanh"),
    }
    fixed = {**LlamaFamily.fixed, "norm": "rms-zero-centred", "scaled_embeddings": True, "bias": False}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        check_causal(hf)
        return {**read_rope(hf), **read_attention_bias(hf)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**write_rope(config), "attention_bias": bool(config.qkv_bias)}


class Gemma2Family(LlamaFamily, name="gemma2"):
    """Gemma 2 (arXiv 2408.00118)."""

    architectures = {"decoder": "Gemma2ForCausalLM"}
    fields = {
        **SHARED,
        "hidden_activation": Field("feedforward", GATED, "gelu_pytorch_tanh"),
        "attn_logit_softcapping": Field("attention_softcap", default=50.0, nullable=True),
        "final_logit_softcapping": Field("logit_softcap", default=30.0, nullable=True),
    }
    fixed = {
        "residual": "sandwich",
        "norm": "rms-zero-centred",
        "positions": "rotary",
        "scaled_embeddings": True,
        "bias": False,
    }
    rules = (
        *OUTSIDE,
        *attention_rules(),
        *feedforward_rules(),
        Rule(THEIRS + "input_layernorm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "post_attention_layernorm", BLOCK + "attention_residual.output_norm"),
        Rule(THEIRS + "pre_feedforward_layernorm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "post_feedforward_layernorm", BLOCK + "feedforward_residual.output_norm"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        kinds = ["sliding_attention", "full_attention"]
        pattern = [kinds[layer % 2] for layer in range(hf["num_hidden_layers"])]
        scale = hf.get("query_pre_attn_scalar", 256) ** -0.5
        return {**read_rope(hf), **read_windows(hf, pattern), "attention_scale": scale}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        scale = config.attention_scale or config.features_per_head**-0.5
        scalar = round(scale**-2, 6)
        return {
            **write_rope(config),
            **write_windows(config),
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        }


class Gemma3Family(Gemma2Family, name="gemma3_text"):
    """Gemma 3 (arXiv 2503.19786): norms of each head's queries and keys, and two bases of rotation."""

    architectures = {"decoder": "Gemma3ForCausalLM"}
    fields = {
        **SHARED,
        "hidden_activation": Field("feedforward", GATED, "gelu_pytorch_tanh"),
        "final_logit_softcapping": "logit_softcap",
    }
    required = {"attn_logit_softcapping": None}  # the library ignores another value
    fixed = {**Gemma2Family.fixed, "qk_norm": "head"}
    rules = (
        *Gemma2Family.rules,
        Rule(THEIRS + "self_attn.q_norm", BLOCK + "attention.query_norm.norm"),
        Rule(THEIRS + "self_attn.k_norm", BLOCK + "attention.key_norm.norm"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        check_causal(hf)
        pattern = mostly_windows(hf["num_hidden_layers"], hf.get("sliding_window_pattern") or 6)
        rope = read_window_rope(hf, default_base=1e6, default_window_base=1e4)
        scale = hf.get("query_pre_attn_scalar", 256) ** -0.5
        return {**rope, **read_attention_bias(hf), **read_windows(hf, pattern), "attention_scale": scale}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        if config.d_model % config.num_heads:
            raise UserError(
                f"d_model {config.d_model} is not divisible by num_heads {config.num_heads}, which {cls.name} needs: "
                "choose another format"
            )
        rope = write_window_rope(config)
        rope["rope_local_base_freq"] = rope["rope_parameters"]["sliding_attention"]["rope_theta"]
        return {**super().write(config), **rope, "attention_bias": bool(config.qkv_bias)}


def check_causal(hf: HF) -> None:
    """Raises `UserError` for an encoder made of a decoder, in which tokens see later ones."""
    if hf.get("use_bidirectional_attention"):
        raise UserError(
            "use_bidirectional_attention is True in config.json: only causal members of this family can be loaded"
        )
