"""DBRX, a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import GATED, HF, Family, Obstacle
from minitransformer.pretrained.llama import BLOCK, QKV
from minitransformer.pretrained.rope import read_rope, write_rope
from minitransformer.pretrained.rules import Rule, StackedHeads, Transform

THEIRS = "transformer.blocks.{layer}."


@dataclass(frozen=True)
class StackedExperts(Transform):
    """One matrix for all experts, whose rows follow each other; each expert's part may be transposed."""

    transposed: bool = False

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        experts = tensor.unflatten(0, (config.num_experts or 0, -1))
        return (experts.mT if self.transposed else experts).unbind()

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat([weight.mT if self.transposed else weight for weight in weights])


EXPERTS = (
    ("w1", "gate", StackedExperts()),
    ("v1", "up", StackedExperts()),
    ("w2", "down", StackedExperts(transposed=True)),
)


class DBRXFamily(Family, name="dbrx"):
    """DBRX (Databricks 2024), its public code."""

    architectures = {"decoder": "DbrxForCausalLM"}
    fields = {
        "vocab_size": "vocab_size",
        "max_seq_len": "context_length",
        "d_model": "d_model",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
    }
    fixed = {
        "residual": "pre",
        "norm": "layer",
        "norm_eps": 1e-5,
        "positions": "rotary",
        "bias": False,
        "tied_embeddings": False,
    }
    required = {"tie_word_embeddings": False}
    prefix = "transformer."

    @classmethod
    def rules_for(cls, config: ModelConfig) -> Sequence[Rule]:
        return (
            Rule("transformer.wte", "embedding.table"),
            Rule(THEIRS + "norm_attn_norm.norm_1", BLOCK + "attention_residual.norm"),
            Rule(THEIRS + "norm_attn_norm.attn.Wqkv", QKV, StackedHeads()),
            Rule(THEIRS + "norm_attn_norm.attn.out_proj", BLOCK + "attention.output"),
            Rule(THEIRS + "norm_attn_norm.norm_2", BLOCK + "feedforward_residual.norm"),
            Rule(THEIRS + "ffn.router.layer", BLOCK + "feedforward.router"),
            *(
                Rule(f"{THEIRS}ffn.experts.mlp.{theirs}", _of_experts(ours, config), stacked, tensors=True)
                for theirs, ours, stacked in EXPERTS
            ),
            Rule("transformer.norm_f", "stack.final_norm"),
            Rule("lm_head", "head"),
        )

    @classmethod
    def _unrepresentable(cls, config: ModelConfig) -> dict[str, Obstacle]:
        found = super()._unrepresentable(config)
        if config.qkv_clip is None:  # which the library reads, and then fails to clamp by
            found["qkv_clip"] = cls._obstacle("qkv_clip", None, (), 8.0)
        return found

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        attention, experts = hf.get("attn_config") or {}, hf.get("ffn_config") or {}
        power = experts.get("moe_normalize_expert_weights", 1.0)
        if power != 1.0:
            raise UserError(f"moe_normalize_expert_weights is {power} in config.json: only 1.0 can be loaded for dbrx")
        activation = (experts.get("ffn_act_fn") or {}).get("name", "silu")
        if activation not in GATED:
            known = ", ".join(map(repr, GATED))
            raise UserError(f"ffn_act_fn is {activation!r} in config.json: known for dbrx are {known}")
        return {
            **_read_rope(hf, attention.get("rope_theta")),
            "num_kv_heads": attention.get("kv_n_heads") or 1,
            "qkv_clip": attention.get("clip_qkv"),
            "d_ff": experts.get("ffn_hidden_size", 3584),
            "num_experts": experts.get("moe_num_experts") or 4,
            "experts_per_token": experts.get("moe_top_k", 1),
            "feedforward": GATED[activation],
        }

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        activation = next((theirs for theirs, ours in GATED.items() if ours == config.feedforward.name), "silu")
        rope = write_rope(config)
        return {
            **rope,
            "attn_config": {
                "kv_n_heads": config.num_kv_heads or config.num_heads,
                "clip_qkv": config.qkv_clip,
                "rope_theta": rope["rope_theta"],
            },
            "ffn_config": {
                "ffn_hidden_size": config.d_ff or config.feedforward.variant.default_width(config.d_model),
                "ffn_act_fn": {"name": activation},
                "moe_num_experts": config.num_experts,
                "moe_top_k": config.experts_per_token,
                "moe_normalize_expert_weights": 1.0,
            },
        }


def _of_experts(name: str, config: ModelConfig) -> tuple[str, ...]:
    return tuple(f"{BLOCK}feedforward.experts.{expert}.{name}.weight" for expert in range(config.num_experts or 0))


def _read_rope(hf: HF, trained_base: float | None) -> dict[str, Any]:
    """`read_rope`, where the base of the training stands in `attn_config`, which newer libraries do not read."""
    hf = {"max_position_embeddings": hf.get("max_seq_len"), **hf}
    ours = read_rope(hf, default_base=trained_base or 10000.0)
    if trained_base is not None and ours["rotary_base"] != trained_base:
        raise UserError(
            f"rope_theta is {ours['rotary_base']} in config.json and {trained_base} in its attn_config: "
            "leave the one that the model was trained with"
        )
    return ours
