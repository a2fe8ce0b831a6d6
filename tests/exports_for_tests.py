"""Runs that leave, and the faults that a copy of one may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.settings import with_settings
from minitransformer.text.chat_template import CHATML
from minitransformer.text.tokenizers import BPE, MASK, Tokenizer
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig

LEARNED = "The quick brown fox, the lazy dog and the cat: it's 1234 o'clock. def f(x): return x\n" * 20
LLAMA = {"norm": "rms", "feedforward": "swiglu", "tied_embeddings": False, "num_kv_heads": 1}
SHAPE = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "context_length": 96}


@cache
def tokenizer_of_conversations() -> Tokenizer:
    return BPE.train(LEARNED, 300).with_special_tokens([MASK, "<|im_start|>", "<|im_end|>"])


@torch.no_grad()
def run_that_leaves(path: Path, objective: str = "causal", *, chat: bool = True, **choices: Any) -> Run:
    """A run of a tiny model whose weights, norms and biases included, are all non-trivial."""
    tokenizer = tokenizer_of_conversations()
    model = build_model(with_settings(ModelConfig(), {**SHAPE, "vocab_size": tokenizer.vocab_size, **choices}))
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.15)
    config = RunConfig(model.config, DataConfig(), TrainingConfig(objective=objective))
    run = Run.create(path, config, tokenizer, tokenizer)
    write_checkpoint(run.checkpoints, 0, model, {})
    if chat:
        (path / "chat_template.jinja").write_text(CHATML)
    return run


Fault = Callable[[Path], None]


def of_json(file: str, change: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault in a JSON file, which `change` edits."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return plant


def of_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    """A fault in a tensor."""

    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return plant


def swapped(left: str, right: str) -> Fault:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[left], tensors[right] = tensors[right], tensors[left]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return plant


def config(**fields: Any) -> Fault:
    return of_json("config.json", lambda content: content.update(fields))


def interleaved(weight: Tensor) -> Tensor:
    """The order of rotary pairs that llama.cpp has."""
    return weight.unflatten(0, (2, 2, -1)).transpose(1, 2).flatten(0, 2)


def without_last_merges(content: dict[str, Any]) -> None:
    del content["model"]["merges"][-1]
    content["model"]["ignore_merges"] = False


def with_swapped_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["t"], vocab["h"] = vocab["h"], vocab["t"]


def with_another_pattern(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def with_a_first_token(content: dict[str, Any]) -> None:
    name, number = "<|endoftext|>", content["added_tokens"][0]["id"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


LAYER, NEXT = "model.layers.0.", "model.layers.1."
IN_A_FOLDER: dict[str, tuple[str, Fault]] = {
    "a permuted matrix": ("weights", of_tensor(LAYER + "mlp.up_proj.weight", lambda weight: weight.flip(0))),
    "queries in llama.cpp's order": ("weights", of_tensor(LAYER + "self_attn.q_proj.weight", interleaved)),
    "a transposed matrix": ("weights", of_tensor(LAYER + "self_attn.q_proj.weight", lambda weight: weight.mT)),
    "gate and up swapped": ("logits", swapped(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    "two norms swapped": (
        "logits",
        swapped(LAYER + "input_layernorm.weight", LAYER + "post_attention_layernorm.weight"),
    ),
    "a rounded norm": ("weights", of_tensor("model.norm.weight", lambda weight: weight.half().float())),
    "a rounded matrix": ("weights", of_tensor("lm_head.weight", lambda weight: weight.bfloat16().float())),
    "a norm around zero": ("logits", of_tensor("model.norm.weight", lambda weight: weight - 1)),
    "a tied head": ("weights", config(tie_word_embeddings=True)),
    "another epsilon": ("logits", config(rms_norm_eps=1e-2)),
    "another activation": ("logits", config(hidden_act="gelu")),
    "another rotary base": ("logits", config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "a missing stop token": ("stop tokens", config(eos_token_id=299)),
    "another stop token": ("stop tokens", config(eos_token_id=[299, 5])),
    "another pre-tokenizer": ("token ids", of_json("tokenizer.json", with_another_pattern)),
    "a missing merge": ("token ids", of_json("tokenizer.json", without_last_merges)),
    "two ids swapped": ("token ids", of_json("tokenizer.json", with_swapped_ids)),
    "a first token": ("token ids", of_json("tokenizer.json", with_a_first_token)),
    "a special token that is text": ("token ids", of_json("tokenizer.json", lambda file: file["added_tokens"].pop())),
    "lower case": (
        "token ids",
        of_json("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
    ),
    "composed characters": (
        "token ids",
        of_json("tokenizer.json", lambda content: content.update(normalizer={"type": "NFC"})),
    ),
    "a template without line breaks": (
        "chat template",
        lambda folder: (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>\n", "<|im_end|> ")),  # type: ignore[dict-item,return-value]
    ),
    "a missing template": ("chat template", lambda folder: (folder / "chat_template.jinja").unlink()),
}
"""faults of a folder of the transformers library, and the comparison that must notice each"""


GATED = {"norm": "rms", "feedforward": "swiglu", "tied_embeddings": False}
GEMMA = {
    **{"norm": "rms-zero-centred", "feedforward": "geglu-tanh", "scaled_embeddings": True, "tied_embeddings": True},
    **{"num_kv_heads": 1, "head_dim": 24},
}
WINDOWS = {"attention_window": 16, "window_pattern": (True, False)}
NEOX = {"positions": "rotary", "bias": True, "feedforward": "gelu", "tied_embeddings": False}
LLAMA3 = {"rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_length": 32}
YARN = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 24}
LONGROPE = {
    **{"rotary_scaling": "longrope", "rotary_original_length": 32},
    **{"rotary_short_factors": (1.0, 1.1) * 4, "rotary_long_factors": (1.0, 2.5) * 4},
}
MEMBERS_OF_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tied_embeddings": True},
    "llama scaled as llama3": {**LLAMA, **LLAMA3},
    "llama scaled by longrope": {**LLAMA, **LONGROPE},
    "mixtral": {**GATED, "num_experts": 2},
    "qwen2": {**GATED, "qkv_bias": True},
    "qwen2 scaled by yarn": {**GATED, "qkv_bias": True, **YARN},
    "qwen2 scaled by yarn of a magnitude": {**GATED, "qkv_bias": True, **YARN, "rotary_magnitude": 1.3},
    "qwen3": {**GATED, "qk_norm": "head"},
    "qwen3moe": {**GATED, "qk_norm": "head", "num_experts": 3, "experts_per_token": 2},
    "olmo2": {**GATED, "qk_norm": "full", "residual": "olmo2"},
    "olmo2 with windows and yarn": {
        **{**GATED, "qk_norm": "full", "residual": "olmo2"},
        **{**WINDOWS, **YARN, "rotary_window_base": 10000.0},
    },
    "granite": {
        **{**GATED, "residual": "pre-scaled", "pre_scaled_multiplier": 0.3, "embedding_scale": 3.0},
        **{"attention_scale": 0.1, "logit_scale": 0.25},
    },
    "smollm3": {**LLAMA, "num_layers": 5, "rotary_layers": (True, True, True, False), "d_model": 16},
    "phi3": {**GATED, "rotary_fraction": 0.5},
    "phi3 scaled by longrope": {**GATED, **LONGROPE},
    "stablelm": {"norm_bias": True, "feedforward": "swiglu", "tied_embeddings": False, "rotary_fraction": 0.5},
    "stablelm parallel": {
        **{"norm_bias": True, "feedforward": "swiglu", "tied_embeddings": False, "rotary_fraction": 0.5},
        **{"qk_norm": "each-head", "block": "parallel", "qkv_bias": True},
    },
    "command-r": {"block": "parallel", "feedforward": "swiglu", "logit_scale": 0.25},
    "dbrx": {"feedforward": "swiglu", "tied_embeddings": False, "num_experts": 3, "qkv_clip": 1.0},
    "gpt2": {"positions": "learned", "bias": True},
    "gptneox": {**NEOX, "block": "parallel-two-norms", "rotary_fraction": 0.25},
    "gptneox sequential": {**NEOX, "rotary_scaling": "linear", "rotary_factor": 2.0},
    "bloom": {"positions": "alibi", "bias": True, "embedding_norm": True},
    "falcon": {**NEOX, "bias": False, "norm_bias": True, "block": "parallel", "num_kv_heads": 1},
    "falcon with two norms": {**NEOX, "bias": False, "norm_bias": True, "block": "parallel-two-norms"},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "residual": "sandwich", "attention_softcap": 50.0, "logit_softcap": 30.0, **WINDOWS},
    "gemma3": {
        **{**GEMMA, **WINDOWS, "residual": "sandwich", "qk_norm": "head"},
        **{"rotary_base": 1e6, "rotary_window_base": 1e4, "rotary_scaling": "linear", "rotary_factor": 8.0},
    },
}


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault in one of several named values."""
    return lambda found: {key: change(value) if key == name else value for key, value in found.items()}


def with_swapped_tokens(tokens: list[str]) -> list[str]:
    return [{"t": "h", "h": "t"}.get(token, token) for token in tokens]


def in_pairs(weight: Tensor) -> Tensor:
    """Back from llama.cpp's order of rotary pairs."""
    return weight.unflatten(0, (2, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


IN_A_FILE: dict[str, tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "queries as they were": ("weights", "save_weights", changed("blk.0.attn_q.weight", in_pairs)),
    "a permuted matrix": ("weights", "save_weights", changed("blk.1.ffn_up.weight", lambda w: w.flip(0))),
    "a rounded norm": ("weights", "save_weights", changed("output_norm.weight", lambda w: w.half().float())),
    "a norm around zero": ("weights", "save_weights", changed("blk.0.attn_norm.weight", lambda w: w - 1)),
    "another pre-tokenizer": ("token ids", "gguf_vocabulary", changed("tokenizer.ggml.pre", lambda name: "gpt-2")),
    "two ids swapped": ("token ids", "gguf_vocabulary", changed("tokenizer.ggml.tokens", with_swapped_tokens)),
    "an ordinary special token": (
        "token ids",
        "gguf_vocabulary",
        changed("tokenizer.ggml.token_type", lambda kinds: [1] * len(kinds)),
    ),
}
"""faults of a GGUF file: the comparison that must notice each, and what makes it of what"""
