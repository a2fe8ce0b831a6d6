"""Tiny members of every public family, with random weights, as the `transformers` library makes and keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitransformer.exporting.copies import outputs_of
from minitransformer.exporting.library import LibraryCopy, class_of
from minitransformer.models.model import Model

VOCABULARY, LENGTH, TARGET_LENGTH, PADDING = 64, 12, 7, 1


# A wrong epsilon costs 8e-5 or more, of a class 2.8e-5, a wrong GELU 7e-4; what is right differs by rounding.
FLOAT32 = 2e-5


@dataclass(frozen=True)
class Member:
    """A tiny model of a family: its class in `transformers`, and the configuration that it is made from."""

    architecture: str
    choices: dict[str, Any] = field(default_factory=dict)
    attention: str = "eager"
    """the library's implementation of attention"""
    counts_tokens: bool = False
    """its positions count real tokens; those of others count places, padding included"""

    @property
    def texts(self) -> int:
        """How many are compared: one has far fewer logits of classes than of tokens."""
        return 48 if "Classification" in self.architecture else 3

    @property
    def two_sided(self) -> bool:
        return "Conditional" in self.architecture or "Marian" in self.architecture


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


ROBERTA = {**BERT, "max_position_embeddings": 18, "type_vocab_size": 1, "pad_token_id": PADDING}


DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 16}


T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}


BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 16,
}


MARIAN = {**BART, "pad_token_id": 63, "decoder_start_token_id": 63, "activation_function": "swish"}


MODERNBERT = {
    **BERT,
    "pad_token_id": PADDING,
    "layer_types": ["full_attention", "sliding_attention"],
    "local_attention": 8,
}


GPT2 = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}


NEOX = {**BERT, "max_position_embeddings": 64}


LLAMA = {**NEOX, "num_key_value_heads": 2}


# A quarter of a head turns: with fewer heads, enough of it that the base of the rotation matters.
STABLELM = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 32,
    "truncate": False,
}


YARN_OF_WHOLE_PAIRS = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.3,
}


LOCAL = {"rope_type": "default", "rope_theta": 50.0}


LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"clip_qkv": 0.8, "kv_n_heads": 2, "rope_theta": 500.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 32,
}


FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


MEMBERS: dict[str, Member] = {
    "bert": Member("BertForMaskedLM", BERT),
    "bert with both heads": Member("BertForPreTraining", BERT),
    "bert classifier": Member("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert headless": Member("BertModel", BERT),
    "roberta": Member("RobertaForMaskedLM", ROBERTA, counts_tokens=True),
    "roberta classifier": Member("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}, counts_tokens=True),
    "roberta headless": Member("RobertaModel", ROBERTA, counts_tokens=True),
    "xlm-roberta headless": Member("XLMRobertaModel", ROBERTA, counts_tokens=True),
    "xlm-roberta": Member("XLMRobertaForMaskedLM", ROBERTA, counts_tokens=True),
    "camembert": Member("CamembertForMaskedLM", ROBERTA, counts_tokens=True),
    "camembert classifier": Member(
        "CamembertForSequenceClassification", {**ROBERTA, "num_labels": 3}, counts_tokens=True
    ),
    "camembert headless": Member("CamembertModel", ROBERTA, counts_tokens=True),
    "modernbert": Member("ModernBertForMaskedLM", MODERNBERT),
    "modernbert biased": Member(
        "ModernBertForMaskedLM",
        {
            **MODERNBERT,
            **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
            "decoder_bias": False,
            "num_hidden_layers": 4,
            "layer_types": None,
            "global_rope_theta": 500.0,
            "local_rope_theta": 50.0,
        },
    ),
    "modernbert classifier": Member("ModernBertForSequenceClassification", {**MODERNBERT, "num_labels": 3}),
    "modernbert classifier of the mean": Member(
        "ModernBertForSequenceClassification", {**MODERNBERT, "classifier_pooling": "mean", "classifier_bias": True}
    ),
    "modernbert headless": Member("ModernBertModel", MODERNBERT),
    "distilbert": Member("DistilBertForMaskedLM", DISTILBERT),
    "distilbert classifier": Member("DistilBertForSequenceClassification", {**DISTILBERT, "num_labels": 1}),
    "distilbert headless": Member("DistilBertModel", DISTILBERT),
    "t5": Member(
        "T5ForConditionalGeneration",
        {**T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
    ),
    "t5 of equal sides": Member("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 2}),
    "mt5": Member("MT5ForConditionalGeneration", T5),
    "t5 1.1": Member(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "bart": Member("BartForConditionalGeneration", BART),
    "bart scaled": Member("BartForConditionalGeneration", {**BART, "scale_embedding": True}),
    "marian": Member("MarianMTModel", {**MARIAN, "scale_embedding": True}),
    "marian unscaled": Member("MarianMTModel", {**MARIAN, "activation_function": "relu"}),
    "pegasus": Member("PegasusForConditionalGeneration", {**BART, "pad_token_id": PADDING}),
    "pegasus scaled": Member(
        "PegasusForConditionalGeneration", {**BART, "scale_embedding": True, "activation_function": "relu"}
    ),
    "gpt2": Member("GPT2LMHeadModel", GPT2),
    "gpt2 untied": Member("GPT2LMHeadModel", {**GPT2, "n_inner": 48, "tie_word_embeddings": False}),
    "gptj": Member("GPTJForCausalLM", {**GPT2, "rotary_dim": 6}),
    "gptj all turned": Member("GPTJForCausalLM", {**GPT2, "rotary_dim": 8}),
    "gpt-neox": Member("GPTNeoXForCausalLM", {**NEOX, "num_attention_heads": 2}),
    "gpt-neox sequential": Member("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.5}),
    "gpt-neox unbiased": Member("GPTNeoXForCausalLM", {**NEOX, "num_attention_heads": 2, "attention_bias": False}),
    "persimmon": Member("PersimmonForCausalLM", {**NEOX, "num_attention_heads": 2}),
    "persimmon without norms": Member("PersimmonForCausalLM", {**NEOX, "qk_layernorm": False, "hidden_act": "gelu"}),
    "opt": Member("OPTForCausalLM", OPT, counts_tokens=True),
    "opt-350m": Member(
        "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, counts_tokens=True
    ),
    "bloom": Member("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, counts_tokens=True),
    "bloom of 6 heads": Member("BloomForCausalLM", {"hidden_size": 48, "n_layer": 2, "n_head": 6}, counts_tokens=True),
    "falcon-7b": Member("FalconForCausalLM", {**FALCON, "multi_query": True}),
    "falcon-40b": Member("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Member(
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    # In the library, attention by hand adds ALiBi twice.
    "falcon-rw": Member(
        "FalconForCausalLM",
        {**FALCON, "hidden_size": 36, "num_attention_heads": 9, "alibi": True, "multi_query": False}
        | {"parallel_attn": False, "bias": True},
        attention="sdpa",
        counts_tokens=True,
    ),
    "falcon sequential": Member(
        "FalconForCausalLM", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "llama": Member("LlamaForCausalLM", LLAMA),
    "llama 3": Member(
        "LlamaForCausalLM", {**LLAMA, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama biased": Member(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    ),
    "llama dynamic": Member(
        "LlamaForCausalLM", {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}
    ),
    "mistral": Member("MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "mistral without window": Member("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "mixtral": Member("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "experts_implementation": "eager"}),
    "qwen2": Member("Qwen2ForCausalLM", LLAMA),
    "qwen2 yarn": Member("Qwen2ForCausalLM", {**LLAMA, "rope_parameters": YARN}),
    "qwen2 windowed": Member(
        "Qwen2ForCausalLM", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Member("Qwen3ForCausalLM", {**LLAMA, "head_dim": 10}),
    "qwen3 biased": Member("Qwen3ForCausalLM", {**LLAMA, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": Member("Olmo2ForCausalLM", LLAMA),
    "gemma2": Member("Gemma2ForCausalLM", {**LLAMA, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma2 uncapped": Member(
        "Gemma2ForCausalLM",
        {**LLAMA, "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma": Member("GemmaForCausalLM", {**LLAMA, "head_dim": 10}),
    "gemma3": Member(
        "Gemma3ForCausalLM",
        {**LLAMA, "num_hidden_layers": 3, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 12}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LINEAR}},
    ),
    "olmo3": Member(
        "Olmo3ForCausalLM",
        {**LLAMA, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
        | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": YARN_OF_WHOLE_PAIRS}},
    ),
    "granite": Member(
        "GraniteForCausalLM",
        {**LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3}
        | {"logits_scaling": 6.0},
    ),
    "smollm3": Member(
        "SmolLM3ForCausalLM",
        {**LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5}
        | {"pad_token_id": PADDING},
    ),
    "phi3": Member(
        "Phi3ForCausalLM",
        {**LLAMA, "sliding_window": 5, "pad_token_id": PADDING}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}},
    ),
    "phi3 longrope": Member(
        "Phi3ForCausalLM",
        {**LLAMA, "pad_token_id": PADDING, "original_max_position_embeddings": 16, "rope_parameters": LONG},
    ),
    "cohere": Member(
        "CohereForCausalLM",
        {**LLAMA, "pad_token_id": PADDING, "attention_bias": True, "use_qk_norm": True, "rope_parameters": LOCAL},
    ),
    "dbrx": Member("DbrxForCausalLM", DBRX),
    "stablelm": Member("StableLmForCausalLM", {**STABLELM, "use_qkv_bias": True}),
    "stablelm 12b": Member("StableLmForCausalLM", {**STABLELM, "qk_layernorm": True, "use_parallel_residual": True}),
    "stablelm parallel": Member("StableLmForCausalLM", {**STABLELM, "use_parallel_residual": True}),
}


@cache
def public(name: str, folder: Path) -> tuple[nn.Module, Path]:
    """A member with random weights, and the folder that `transformers` keeps it in."""
    import transformers

    member = MEMBERS[name]
    model_class = getattr(transformers, member.architecture)
    config = model_class.config_class(vocab_size=VOCABULARY, attn_implementation=member.attention, **member.choices)
    # What a test draws next must not depend on whether the member was there already.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        if name in (
            "t5 1.1",
            "mt5",
        ):  # the library ties the head of every new T5, and unties it for files that have one
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        _shake(model)
    model.save_pretrained(folder / name)
    return model, folder / name


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Draw all weights, so that no gain is 1 and no bias is 0; sinusoids stay what they are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if name == "final_logits_bias" or (tensor.requires_grad and "sinusoid" not in name):
            offset = tensor.mean() if tensor.dim() == 1 else 0.0
            tensor.normal_(std=0.2).add_(offset)


@torch.inference_mode()
def reopened_difference(model: Model, folder: Path) -> float:
    """The largest difference between outputs of `model` and of its copy in `folder`, of their root mean square."""
    model_class, runtime = class_of(folder)
    copy = LibraryCopy(folder, model_class, runtime, start=0)
    shape, size = (2, min(16, model.config.context_length)), model.config.vocab_size
    tokens = torch.randint(size, shape, generator=torch.Generator().manual_seed(0))
    if (padding := copy.model.config.pad_token_id) is not None:
        tokens = torch.where(tokens == padding, (tokens + 1) % size, tokens)
    inputs = (tokens, tokens) if model.config.topology == "encoder-decoder" else (tokens,)
    ours, theirs = outputs_of(model, *inputs), copy.outputs(*inputs)
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
