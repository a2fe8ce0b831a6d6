"""Tiny random models of every family, made by the `transformers` library, with no weight at its trivial value."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

VOCAB = 64
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**BERT, "max_position_embeddings": 64}
BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
}
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}

# Name of the variant: class of the model, class of its configuration, fields.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", {**BERT, "max_position_embeddings": 32}),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**BERT, "max_position_embeddings": 34}),
    "roberta-classes": ("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "num_labels": 3}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 4}),
    "distilbert-classes": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "num_labels": 3},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {
            **BART,
            "pad_token_id": 63,
            "decoder_start_token_id": 63,
            "activation_function": "swish",
            "scale_embedding": True,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_key_value_heads": 2}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "num_key_value_heads": 2}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**LLAMA, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "num_key_value_heads": 2, "head_dim": 10}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**LLAMA, "num_key_value_heads": 2}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 12},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LLAMA),
    "gpt-neox-sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**LLAMA, "use_parallel_residual": False}),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    ),
    "opt-350m": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4},
            **{"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        },
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon-7b": (
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
    ),
    "falcon-40b": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_kv_heads": 2, "new_decoder_architecture": True},
        },
    ),
    "falcon-sequential": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"multi_query": False, "parallel_attn": False, "bias": True},
        },
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**LLAMA, "num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**LLAMA, "num_key_value_heads": 4, "use_parallel_residual": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            **LLAMA,
            **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
            # The default one has no float64.
            "experts_implementation": "eager",
        },
    ),
}


@torch.no_grad()
def reference(variant: str) -> Any:
    """A model of `variant` with weights that are the same every time."""
    model_class, config_class, fields = VARIANTS[variant]
    config = getattr(hf, config_class)(vocab_size=VOCAB, **fields)
    torch.manual_seed(0)
    model = getattr(hf, model_class)(config).eval()
    for name, weight in model.named_parameters():
        if variant == "marian" and "embed_positions" in name:  # sinusoids
            continue
        weight.add_(0.2 * torch.randn_like(weight)) if weight.dim() == 1 else weight.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_(std=0.3)
    if variant == "t5-1.1":
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    return model
