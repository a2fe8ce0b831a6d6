"""Llama and families with its tensor names: Mistral, Mixtral, Qwen, OLMo, StableLM, Granite, SmolLM3, Phi-3."""

from __future__ import annotations

from typing import Any

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, SHAPE, Family, Field
from minitransformer.pretrained.rope import (
    ORIGINAL,
    read_partial_rope,
    read_rope,
    read_window_rope,
    write_partial_rope,
    write_rope,
    write_window_rope,
)
from minitransformer.pretrained.rules import Halves, Rule, StackedHeads

BLOCK = "stack.blocks.{layer}."
QKV = (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value")
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


def read_attention_bias(hf: HF) -> dict[str, Any]:
    """The biases of all four projections of attention."""
    bias = hf.get("attention_bias", False)
    return {"qkv_bias": bias, "attention_output_bias": bias}


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
        return {**read_rope(hf), **read_attention_bias(hf), "bias": hf.get("mlp_bias", False)}

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
    if not any(sliding):
        return {"attention_window": None}
    return {"attention_window": hf.get("sliding_window", 4096), "window_pattern": sliding}


def mostly_windows(layers: int, every: int) -> list[str]:
    """The kinds of layers where all but every so manieth have a sliding window."""
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


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
        return {**super().read(hf), **read_attention_bias(hf)}

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


class OLMo3Family(OLMo2Family, name="olmo3"):
    """OLMo 3 (arXiv 2512.13961): OLMo-2 with a sliding window in three of four layers, which scalings leave alone."""

    architectures = {"decoder": "Olmo3ForCausalLM"}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        windows = read_windows(hf, mostly_windows(hf["num_hidden_layers"], 4))
        return {**read_window_rope(hf, default_base=5e5), **read_attention_bias(hf), **windows}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), **write_window_rope(config), **write_windows(config)}


class GraniteFamily(LlamaFamily, name="granite"):
    """Granite 3 (IBM 2024): Llama with constant factors of embeddings, scores, sublayers and logits."""

    architectures = {"decoder": "GraniteForCausalLM"}
    fields = {
        **LLAMA_FIELDS,
        "embedding_multiplier": Field("embedding_scale", default=1.0),
        "residual_multiplier": Field("pre_scaled_multiplier", default=1.0),
        "attention_multiplier": Field("attention_scale", default=1.0),
    }
    fixed = {**LlamaFamily.fixed, "residual": "pre-scaled"}

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {**super().read(hf), "logit_scale": 1 / hf.get("logits_scaling", 1.0)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {**super().write(config), "logits_scaling": 1 / config.logit_scale}


class SmolLM3Family(LlamaFamily, name="smollm3"):
    """SmolLM3 (Hugging Face 2025): Llama, without rotation in every fourth layer."""

    architectures = {"decoder": "SmolLM3ForCausalLM"}
    fields = {
        **LLAMA_FIELDS,
        "num_key_value_heads": Field("num_kv_heads", default=4, nullable=True),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        every, layers = hf.get("no_rope_layer_interval", 4), range(hf["num_hidden_layers"])
        rotated = tuple(map(bool, hf.get("no_rope_layers") or [(layer + 1) % every for layer in layers]))
        has_windows = hf.get("use_sliding_window") and hf.get("sliding_window")
        pattern = ["full_attention" if turns or not has_windows else "sliding_attention" for turns in rotated]
        windows = read_windows({"sliding_window": None, **hf}, pattern)
        return {**super().read(hf), **read_rope(hf, default_base=2e6), **windows, "rotary_layers": rotated}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        pattern = config.positions.settings.layers
        return {
            **super().write(config),
            **write_windows(config),
            "no_rope_layers": [int(pattern[layer % len(pattern)]) for layer in range(config.num_layers)],
            "use_sliding_window": config.attention_window is not None,
            "pad_token_id": None,  # whose default is beyond most vocabularies
        }


class Phi3Family(LlamaFamily, name="phi3"):
    """Abdin et al. 2024 (arXiv 2404.14219), and Phi-4: Llama with matrices side by side."""

    architectures = {"decoder": "Phi3ForCausalLM"}
    fields = {
        **LLAMA_FIELDS,
        "rms_norm_eps": Field("norm_eps", default=1e-5),
        "sliding_window": "attention_window",
    }
    fixed = {**LlamaFamily.fixed, "bias": False}
    rules = (
        *OUTSIDE,
        *PRE_LN,
        Rule(THEIRS + "self_attn.qkv_proj", QKV, StackedHeads()),
        Rule(THEIRS + "self_attn.o_proj", BLOCK + "attention.output"),
        Rule(THEIRS + "mlp.gate_up_proj", (BLOCK + "feedforward.gate", BLOCK + "feedforward.up"), Halves()),
        Rule(THEIRS + "mlp.down_proj", BLOCK + "feedforward.down"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):  # former names
            rope["rope_type"] = "longrope"
        said = {ORIGINAL: 4096, **hf, "rope_scaling": None, "rope_parameters": rope}
        return read_partial_rope(said, default_fraction=1.0)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        # The default padding is beyond most vocabularies.
        rope = write_partial_rope(config, kinds=("default", "longrope"))
        original = rope["rope_parameters"].get(ORIGINAL, config.context_length)
        return {**rope, ORIGINAL: original, "pad_token_id": None}


class StableLMFamily(LlamaFamily, name="stablelm"):
    """Bellagente et al. 2024 (arXiv 2402.17834): Llama's tensors with LayerNorm."""

    architectures = {"decoder": "StableLmForCausalLM"}
    fields = {
        **GROUPED_SHAPE,
        "layer_norm_eps": Field("norm_eps", default=1e-5),
        "hidden_act": Field("feedforward", GATED, "silu"),
        "use_qkv_bias": Field("qkv_bias", default=False),
        "use_parallel_residual": Field("block", {True: "parallel", False: "sequential"}, False),
        "qk_layernorm": Field("qk_norm", {True: "each-head", False: "none"}, False),
        "tie_word_embeddings": Field("tied_embeddings", default=False),
    }
    fixed = {"residual": "pre", "norm": "layer", "norm_bias": True, "positions": "rotary", "bias": False}
    rules = (
        *LlamaFamily.rules,
        Rule(THEIRS + "input_layernorm", BLOCK + "residual.norm"),
        Rule(THEIRS + "self_attn.q_layernorm.norms.{head}", BLOCK + "attention.query_norm.norms.{head}"),
        Rule(THEIRS + "self_attn.k_layernorm.norms.{kv_head}", BLOCK + "attention.key_norm.norms.{kv_head}"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_partial_rope(hf)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_partial_rope(config)
