"""GPT-2, GPT-J, GPT-NeoX, Persimmon, OPT, Bloom and Falcon."""

from __future__ import annotations

import math
from typing import Any

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import ACTIVATIONS, HF, SHAPE, Family, Field
from minitransformer.pretrained.rope import read_partial_rope, read_rope, write_partial_rope, write_rope
from minitransformer.pretrained.rules import (
    GroupedHeads,
    InterleavedPairs,
    Rule,
    Transposed,
    TransposedThirds,
    WithoutFirst,
)
from minitransformer.pretrained.seq2seq import bart_block

BLOCK = "stack.blocks.{layer}."
QKV = (BLOCK + "attention.query", BLOCK + "attention.key", BLOCK + "attention.value")


class GPT2Family(Family, name="gpt2"):
    """Radford et al. 2019."""

    architectures = {"decoder": "GPT2LMHeadModel"}
    fields = {
        "vocab_size": "vocab_size",
        "n_positions": "context_length",
        "n_embd": "d_model",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_inner": "d_ff",
        "layer_norm_epsilon": Field("norm_eps", default=1e-5),
        "activation_function": Field("feedforward", ACTIVATIONS, "gelu_new"),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {"residual": "pre", "norm": "layer", "positions": "learned", "bias": True}
    required = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    prefix = "transformer."
    rules = (
        Rule("transformer.wte", "embedding.table"),
        Rule("transformer.wpe", "stack.positions.table"),
        Rule("transformer.h.{layer}.ln_1", BLOCK + "attention_residual.norm"),
        Rule("transformer.h.{layer}.attn.c_attn", QKV, TransposedThirds()),
        Rule("transformer.h.{layer}.attn.c_proj", BLOCK + "attention.output", Transposed()),
        Rule("transformer.h.{layer}.ln_2", BLOCK + "feedforward_residual.norm"),
        Rule("transformer.h.{layer}.mlp.c_fc", BLOCK + "feedforward.up", Transposed()),
        Rule("transformer.h.{layer}.mlp.c_proj", BLOCK + "feedforward.down", Transposed()),
        Rule("transformer.ln_f", "stack.final_norm"),
        Rule("lm_head", "head"),
    )
    ignored = (r"\.attn\.(masked_)?bias$",)


class GPTJFamily(Family, name="gptj"):
    """Wang and Komatsuzaki 2021: attention and feed-forward network in parallel."""

    architectures = {"decoder": "GPTJForCausalLM"}
    fields = {**GPT2Family.fields, "tie_word_embeddings": Field("tied_embeddings", default=False)}
    fixed = {
        "residual": "pre",
        "norm": "layer",
        "block": "parallel",
        "positions": "rotary",
        "bias": True,
        "qkv_bias": False,
        "attention_output_bias": False,
        "head_bias": True,
    }
    prefix = "transformer."
    rules = (
        Rule("transformer.wte", "embedding.table"),
        Rule("transformer.h.{layer}.ln_1", BLOCK + "residual.norm"),
        Rule("transformer.h.{layer}.attn.q_proj", BLOCK + "attention.query", InterleavedPairs()),
        Rule("transformer.h.{layer}.attn.k_proj", BLOCK + "attention.key", InterleavedPairs()),
        Rule("transformer.h.{layer}.attn.v_proj", BLOCK + "attention.value"),
        Rule("transformer.h.{layer}.attn.out_proj", BLOCK + "attention.output"),
        Rule("transformer.h.{layer}.mlp.fc_in", BLOCK + "feedforward.up"),
        Rule("transformer.h.{layer}.mlp.fc_out", BLOCK + "feedforward.down"),
        Rule("transformer.ln_f", "stack.final_norm"),
        Rule("lm_head", "head"),
    )
    ignored = GPT2Family.ignored

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        head_dim = hf["n_embd"] // hf["n_head"]
        turned = hf.get("rotary_dim") or head_dim
        # The product with head_dim is truncated to an integer, which must be this one.
        return {"rotary_fraction": 1.0 if turned == head_dim else math.nextafter(turned / head_dim, 1.0)}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        head_dim = config.d_model // config.num_heads  # the only one in this family
        return {"rotary_dim": int(head_dim * config.positions.settings.fraction)}


class GPTNeoXFamily(Family, name="gpt_neox"):
    """Black et al. 2022 (arXiv 2204.06745), and Pythia."""

    architectures = {"decoder": "GPTNeoXForCausalLM"}
    fields = {
        **SHAPE,
        "intermediate_size": "d_ff",
        "layer_norm_eps": Field("norm_eps", default=1e-5),
        "hidden_act": Field("feedforward", ACTIVATIONS, "gelu"),
        "use_parallel_residual": Field("block", {True: "parallel-two-norms", False: "sequential"}, True),
        "tie_word_embeddings": Field("tied_embeddings", default=False),
    }
    fixed = {"residual": "pre", "norm": "layer", "positions": "rotary", "bias": True}
    prefix = "gpt_neox."
    rules = (
        Rule("gpt_neox.embed_in", "embedding.table"),
        Rule("gpt_neox.layers.{layer}.input_layernorm", BLOCK + "residual.norm"),
        Rule("gpt_neox.layers.{layer}.post_attention_layernorm", BLOCK + "feedforward_norm"),
        Rule("gpt_neox.layers.{layer}.input_layernorm", BLOCK + "attention_residual.norm"),
        Rule("gpt_neox.layers.{layer}.post_attention_layernorm", BLOCK + "feedforward_residual.norm"),
        Rule("gpt_neox.layers.{layer}.attention.query_key_value", QKV, GroupedHeads()),
        Rule("gpt_neox.layers.{layer}.attention.dense", BLOCK + "attention.output"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", BLOCK + "feedforward.up"),
        Rule("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", BLOCK + "feedforward.down"),
        Rule("gpt_neox.final_layer_norm", "stack.final_norm"),
        Rule("embed_out", "head"),
    )
    ignored = (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        bias = hf.get("attention_bias", True)
        return {**read_partial_rope(hf), "qkv_bias": bias, "attention_output_bias": bias}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        rotary = config.positions.settings
        older = {"rotary_pct": rotary.fraction, "rotary_emb_base": rotary.base}
        return {**write_partial_rope(config), **older, "attention_bias": config.qkv_bias is not False}


THEIRS = "model.layers.{layer}."


class PersimmonFamily(Family, name="persimmon"):
    """Adept 2023: GPT-NeoX's blocks in sequence, with squared ReLU and a norm of each head's queries and keys."""

    architectures = {"decoder": "PersimmonForCausalLM"}
    fields = {
        **SHAPE,
        "intermediate_size": "d_ff",
        "layer_norm_eps": Field("norm_eps", default=1e-5),
        "hidden_act": Field("feedforward", {**ACTIVATIONS, "relu2": "squared-relu"}, "relu2"),
        "qk_layernorm": Field("qk_norm", {True: "head", False: "none"}, True),
        "tie_word_embeddings": Field("tied_embeddings", default=False),
    }
    fixed = {"residual": "pre", "norm": "layer", "positions": "rotary", "bias": True}
    prefix = "model."
    rules = (
        Rule("model.embed_tokens", "embedding.table"),
        Rule(THEIRS + "input_layernorm", BLOCK + "attention_residual.norm"),
        Rule(THEIRS + "self_attn.query_key_value", QKV, GroupedHeads()),
        Rule(THEIRS + "self_attn.q_layernorm", BLOCK + "attention.query_norm.norm"),
        Rule(THEIRS + "self_attn.k_layernorm", BLOCK + "attention.key_norm.norm"),
        Rule(THEIRS + "self_attn.dense", BLOCK + "attention.output"),
        Rule(THEIRS + "post_attention_layernorm", BLOCK + "feedforward_residual.norm"),
        Rule(THEIRS + "mlp.dense_h_to_4h", BLOCK + "feedforward.up"),
        Rule(THEIRS + "mlp.dense_4h_to_h", BLOCK + "feedforward.down"),
        Rule("model.final_layernorm", "stack.final_norm"),
        Rule("lm_head", "head"),
    )
    ignored = (r"rotary_emb\.inv_freq$",)

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return read_partial_rope(hf, default_fraction=0.5)

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return write_partial_rope(config)


class OPTFamily(Family, name="opt"):
    """Zhang et al. 2022 (arXiv 2205.01068): Pre-LN, except for Post-LN in the 350M model."""

    architectures = {"decoder": "OPTForCausalLM"}
    fields = {
        **SHAPE,
        "ffn_dim": "d_ff",
        "activation_function": Field("feedforward", ACTIVATIONS, "relu"),
        "do_layer_norm_before": Field("residual", {True: "pre", False: "post"}, True),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {"norm": "layer", "norm_eps": 1e-5, "positions": "learned", "bias": True}
    required = {"_remove_final_layer_norm": False, "enable_bias": True, "layer_norm_elementwise_affine": True}
    prefix = "model."
    rules = (
        Rule("model.decoder.embed_tokens", "embedding.table"),
        Rule("model.decoder.project_in", "embedding.project"),
        Rule("model.decoder.embed_positions", "stack.positions.table", WithoutFirst(2)),
        *bart_block("model.decoder.layers.{layer}.", BLOCK),
        Rule("model.decoder.final_layer_norm", "stack.final_norm"),
        Rule("model.decoder.project_out", "head.0"),
        Rule("lm_head", "head"),
        Rule("lm_head", "head.1"),
    )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        features = hf.get("word_embed_proj_dim") or hf["hidden_size"]
        return {"embedding_dim": None if features == hf["hidden_size"] else features}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"word_embed_proj_dim": config.embedding_dim or config.d_model}


class BloomFamily(Family, name="bloom"):
    """BigScience 2022 (arXiv 2211.05100)."""

    architectures = {"decoder": "BloomForCausalLM"}
    fields = {
        "vocab_size": "vocab_size",
        "hidden_size": Field("d_model", older=["n_embed"]),
        "n_layer": Field("num_layers", older=["num_hidden_layers"]),
        "n_head": Field("num_heads", older=["num_attention_heads"]),
        "seq_length": Field("context_length", default=2048),
        "layer_norm_epsilon": Field("norm_eps", default=1e-5),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {
        "residual": "pre",
        "norm": "layer",
        "positions": "alibi",
        "bias": True,
        "embedding_norm": True,
        "feedforward": "gelu-tanh",
    }
    required = {"apply_residual_connection_post_layernorm": False}
    prefix = "transformer."
    rules = (
        Rule("transformer.word_embeddings", "embedding.table"),
        Rule("transformer.word_embeddings_layernorm", "stack.embedding_norm"),
        Rule("transformer.h.{layer}.input_layernorm", BLOCK + "attention_residual.norm"),
        Rule("transformer.h.{layer}.self_attention.query_key_value", QKV, GroupedHeads()),
        Rule("transformer.h.{layer}.self_attention.dense", BLOCK + "attention.output"),
        Rule("transformer.h.{layer}.post_attention_layernorm", BLOCK + "feedforward_residual.norm"),
        Rule("transformer.h.{layer}.mlp.dense_h_to_4h", BLOCK + "feedforward.up"),
        Rule("transformer.h.{layer}.mlp.dense_4h_to_h", BLOCK + "feedforward.down"),
        Rule("transformer.ln_f", "stack.final_norm"),
        Rule("lm_head", "head"),
    )


class FalconFamily(Family, name="falcon"):
    """Almazrouei et al. 2023 (arXiv 2311.16867): rotary positions, or in Falcon-RW ALiBi."""

    architectures = {"decoder": "FalconForCausalLM"}
    fields = {
        "vocab_size": "vocab_size",
        "max_position_embeddings": Field("context_length", default=2048),
        "hidden_size": Field("d_model", older=["n_embed"]),
        "num_hidden_layers": Field("num_layers", older=["n_layer"]),
        "num_attention_heads": Field("num_heads", older=["n_head"]),
        "layer_norm_epsilon": Field("norm_eps", default=1e-5),
        "activation": Field("feedforward", ACTIVATIONS, "gelu"),
        "alibi": Field("positions", {False: "rotary", True: "alibi-falcon"}, False),
        "bias": Field("bias", default=False),
        "tie_word_embeddings": Field("tied_embeddings", default=True),
    }
    fixed = {"residual": "pre", "norm": "layer", "norm_bias": True}
    prefix = "transformer."

    @classmethod
    def rules_for(cls, config: ModelConfig) -> tuple[Rule, ...]:
        norm = "ln_attn" if config.block.name == "parallel-two-norms" else "input_layernorm"
        return (
            *BloomFamily.rules,
            Rule("transformer.h.{layer}." + norm, BLOCK + "residual.norm"),
            Rule("transformer.h.{layer}.ln_mlp", BLOCK + "feedforward_norm"),
        )

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        grouped = hf.get("new_decoder_architecture", False)
        heads = hf["num_attention_heads"]
        shared = hf.get("num_kv_heads") or hf.get("n_head_kv") or heads
        shared = shared if grouped else 1 if hf.get("multi_query", True) else heads
        two_norms = grouped and hf.get("num_ln_in_parallel_attn") in (None, 2)
        parallel = "parallel-two-norms" if two_norms else "parallel"
        return {
            **({} if hf.get("alibi") else read_rope(hf)),
            "num_kv_heads": shared,
            "d_ff": hf.get("ffn_hidden_size") or 4 * hf["hidden_size"],
            "block": parallel if grouped or hf.get("parallel_attn", True) else "sequential",
        }

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        heads = config.num_kv_heads or config.num_heads
        grouped = config.block.name == "parallel-two-norms" or heads not in (1, config.num_heads)
        return {
            **(write_rope(config) if config.positions.name == "rotary" else {}),
            "num_kv_heads": heads,
            "new_decoder_architecture": grouped,
            "num_ln_in_parallel_attn": (2 if config.block.name == "parallel-two-norms" else 1) if grouped else None,
            "multi_query": heads == 1,
            "parallel_attn": config.block.name != "sequential",
            "ffn_hidden_size": config.d_ff or 4 * config.d_model,
        }
