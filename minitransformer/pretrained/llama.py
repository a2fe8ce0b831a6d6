"""Llama and families with its tensor names: Mistral, Mixtral, Qwen, OLMo-2, Gemma-2, StableLM."""

from __future__ import annotations

from typing import Any

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, SHAPE, Family, Field
from minitransformer.pretrained.rope import read_partial_rope, read_rope, write_partial_rope, write_rope
from minitransformer.pretrained.rules import Rule

BLOCK = "stack.blocks.{layer}."
THEIRS = "model.layers.{layer}."


def attention_rules() -> tuple[Rule, ...]:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    return tuple(Rule(f"{THEIRS}self_attn.{theirs}", f"{BLOCK}attention.{ours}") for theirs, ours in names.items())


def feedforward_rules() -> tuple[Rule, ...]:
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return tuple(Rule(f"{THEIRS}mlp.{theirs}", f"{BLOCK}feedforward.{ours}") for theirs, ours in names.items())


OUTSIDE = (
    Rule("model.embed_tokens", "embedding.table"),
    Rule("model.norm", "stack.final_norm"),
    Rule("lm_head", "head"),
)
PRE_LN = (
    Rule(THEIRS + "input_layernorm", BLOCK + "attention_residual.norm"),
    Rule(THEIRS + "post_attention_layernorm", BLOCK + "feedforward_residual.norm"),
)
GROUPED_SHAPE = {**SHAPE, "num_key_value_heads": "num_kv_heads", "intermediate_size": "d_ff"}
LLAMA_FIELDS: dict[str, Field | str] = {
    **GROUPED_SHAPE,
    "rms_norm_eps": Field("norm_eps", default=1e-6),
    "hidden_act": Field("feedforward", GATED, "silu"),
    "tie_word_embeddings": Field("tied_embeddings", default=False),
}


class LlamaFamily(Family, name="llama"):
    """Touvron et al. 2023 (arXiv 2302.13971), Llama 2 and 3, and their fine-tunes."""

    architectures = {"decoder": "LlamaForCausalLM"}
    fields = {**LLAMA_FIELDS, "head_dim": "head_dim"}
    fixed = {"residual": "pre", "norm": "rms", "positions": "rotary"}
    rules = (*OUTSIDE, *PRE_LN, *attention_rules(), *feedforward_rules())
    ignored = (r"rotary_emb\.inv_freq$",)
    prefix = "model."

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        attention, mlp = hf.get("attention_bias", False), hf.get("mlp_bias", False)
        return {**read_rope(hf), "bias": mlp, "qkv_bias": attention, "attention_output_bias": attention}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        attention = config.bias if config.qkv_bias is None else config.qkv_bias
        return {**write_rope(config), "attention_bias": attention, "mlp_bias": config.bias}


class MistralFamily(LlamaFamily, name="mistral"):
    """Jiang et al. 2023 (arXiv 2310.06825): Llama with a sliding window."""

    architectures = {"decoder": "MistralForCausalLM"}
    fields = {**LlamaFamily.fields, "sliding_window": Field("attention_window", default=4096, nullable=True)}
    fixed = {**LlamaFamily.fixed, "bias": False}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_rope(hf)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_rope(config)


class MixtralFamily(MistralFamily, name="mixtral"):
    """Jiang et al. 2024 (arXiv 2401.04088): Mistral with experts."""

    architectures = {"decoder": "MixtralForCausalLM"}
    fields = {
        **MistralFamily.fields,
        "rms_norm_eps": Field("norm_eps", default=1e-5),
        "sliding_window": "attention_window",
        "num_local_experts": Field("num_experts", default=8),
        "num_experts_per_tok": Field("experts_per_token", default=2),
    }
    rules = (
        *OUTSIDE,
        *PRE_LN,
        *attention_rules(),
        Rule(THEIRS + "block_sparse_moe.gate", BLOCK + "feedforward.router"),
        Rule(THEIRS + "block_sparse_moe.experts.{expert}.w1", BLOCK + "feedforward.experts.{expert}.gate"),
        Rule(THEIRS + "block_sparse_moe.experts.{expert}.w3", BLOCK + "feedforward.experts.{expert}.up"),
        Rule(THEIRS + "block_sparse_moe.experts.{expert}.w2", BLOCK + "feedforward.experts.{expert}.down"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_rope(hf, default_base=1e6)


def read_windows(hf: HF, pattern: list[str]) -> dict[str, Any]:
    """The window and its layers, from `layer_types`, or by default `pattern`."""
    kinds = hf.get("layer_types") or pattern
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"attention_window": hf.get("sliding_window", 4096), "window_pattern": sliding} if any(sliding) else {}


def write_windows(config: ModelConfig) -> HF:
    """Both; without a window in any layer, one as long as the context, because Gemma-2 always needs one."""
    sliding = [config.window_of(layer) is not None for layer in range(config.num_layers)]
    return {
        "sliding_window": config.attention_window or config.context_length,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
    }


class Qwen2Family(LlamaFamily, name="qwen2"):
    """Yang et al. 2024 (arXiv 2407.10671): biases of queries, keys and values."""

    architectures = {"decoder": "Qwen2ForCausalLM"}
    fields = LLAMA_FIELDS
    fixed = {"residual": "pre", "norm": "rms", "positions": "rotary", "bias": False, "qkv_bias": True}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        first = hf.get("max_window_layers", 28)
        pattern = ["sliding_attention" if i >= first else "full_attention" for i in range(hf["num_hidden_layers"])]
        return {**read_rope(hf), **(read_windows(hf, pattern) if hf.get("use_sliding_window") else {})}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        used = config.attention_window is not None
        return {**write_rope(config), **write_windows(config), "use_sliding_window": used}


class Qwen3Family(Qwen2Family, name="qwen3"):
    """Yang et al. 2025 (arXiv 2505.09388): a norm of each head's queries and keys instead of the biases."""

    architectures = {"decoder": "Qwen3ForCausalLM"}
    fields = {**Qwen2Family.fields, "head_dim": Field("head_dim", default=128)}
    fixed = {"residual": "pre", "norm": "rms", "positions": "rotary", "bias": False, "qk_norm": "head"}
    rules = (
        *LlamaFamily.rules,
        Rule(THEIRS + "self_attn.q_norm", BLOCK + "attention.query_norm.norm"),
        Rule(THEIRS + "self_attn.k_norm", BLOCK + "attention.key_norm.norm"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        bias = hf.get("attention_bias", False)
        return {**super().read(hf), "qkv_bias": bias, "attention_output_bias": bias}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), "attention_bias": bool(config.qkv_bias)}


class OLMo2Family(LlamaFamily, name="olmo2"):
    """OLMo 2 (arXiv 2501.00656): norms after the sublayers, and of whole queries and keys."""

    architectures = {"decoder": "Olmo2ForCausalLM"}
    fields = {**LLAMA_FIELDS, "rms_norm_eps": Field("norm_eps", default=1e-5)}
    fixed = {"residual": "olmo2", "norm": "rms", "positions": "rotary", "qk_norm": "full", "bias": False}
    rules = (
        *OUTSIDE,
        *attention_rules(),
        *feedforward_rules(),
        Rule(THEIRS + "post_attention_layernorm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "post_feedforward_layernorm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "self_attn.q_norm", BLOCK + "attention.query_norm"),
        Rule(THEIRS + "self_attn.k_norm", BLOCK + "attention.key_norm"),
    )


class Gemma2Family(LlamaFamily, name="gemma2"):
    """Gemma 2 (arXiv 2408.00118)."""

    architectures = {"decoder": "Gemma2ForCausalLM"}
    fields = {
        **GROUPED_SHAPE,
        "head_dim": Field("head_dim", default=256),
        "rms_norm_eps": Field("norm_eps", default=1e-6),
        "hidden_activation": Field("feedforward", GATED, "gelu_pytorch_tanh"),
        "attn_logit_softcapping": Field("attention_softcap", default=50.0, nullable=True),
        "final_logit_softcapping": Field("logit_softcap", default=30.0, nullable=True),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
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


class StableLMFamily(LlamaFamily, name="stablelm"):
    """Bellagente et al. 2024 (arXiv 2402.17834): Llama's tensors with LayerNorm."""

    architectures = {"decoder": "StableLmForCausalLM"}
    fields = {
        **GROUPED_SHAPE,
        "layer_norm_eps": Field("norm_eps", default=1e-5),
        "hidden_act": Field("feedforward", GATED, "silu"),
        "use_qkv_bias": Field("qkv_bias", default=False),
        "use_parallel_residual": Field("block", {True: "parallel", False: "sequential"}, False),
        "tie_word_embeddings": Field("tied_embeddings", default=False),
    }
    fixed = {"residual": "pre", "norm": "layer", "norm_bias": True, "positions": "rotary", "bias": False}
    required = {"qk_layernorm": False}
    rules = (*LlamaFamily.rules, Rule(THEIRS + "input_layernorm", BLOCK + "residual.norm"))

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_partial_rope(hf)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_partial_rope(config)
