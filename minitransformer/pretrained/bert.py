"""BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import ACTIVATIONS, HF, SHAPE, Family, Field
from minitransformer.pretrained.rules import Reversed, Rule, WithoutFirst

BLOCK = "stack.blocks.{layer}."


def encoder_rules(prefix: str) -> tuple[Rule, ...]:
    """The blocks of BERT and RoBERTa, with names that start with `prefix`."""
    layer = prefix + "encoder.layer.{layer}."
    return (
        Rule(prefix + "embeddings.word_embeddings", "embedding.table"),
        Rule(prefix + "embeddings.token_type_embeddings", "embedding.segments"),
        Rule(prefix + "embeddings.LayerNorm", "stack.embedding_norm"),
        Rule(layer + "attention.self.query", BLOCK + "attention.query"),
        Rule(layer + "attention.self.key", BLOCK + "attention.key"),
        Rule(layer + "attention.self.value", BLOCK + "attention.value"),
        Rule(layer + "attention.output.dense", BLOCK + "attention.output"),
        Rule(layer + "attention.output.LayerNorm", BLOCK + "attention_residual.norm"),
        Rule(layer + "intermediate.dense", BLOCK + "feedforward.up"),
        Rule(layer + "output.dense", BLOCK + "feedforward.down"),
        Rule(layer + "output.LayerNorm", BLOCK + "feedforward_residual.norm"),
    )


def head_rules(names: Mapping[str, str], bias: str, decoder: str) -> tuple[Rule, ...]:
    """The masked-language-model head, with a separate bias tensor; `decoder` has copies of weight and bias."""
    modules = tuple(Rule(theirs, ours) for theirs, ours in names.items())
    return (*modules, Rule(bias, "head.head.bias", tensors=True), Rule(decoder, "head.head"))


FIXED = {
    "residual": "post",
    "first_norm": True,
    "norm": "layer",
    "positions": "learned",
    "bias": True,
    "embedding_norm": True,
    "head": "transformed",
    "head_bias": True,
}


# BERT with both of its pretraining heads.
NEXT_SENTENCE = "BertForPreTraining"


class BERTFamily(Family, name="bert"):
    """Devlin et al. 2018 (arXiv 1810.04805)."""

    architectures = {
        "encoder": "BertForMaskedLM",
        "encoder-classifier": "BertForSequenceClassification",
        "encoder-headless": "BertModel",
    }
    fields = {
        **SHAPE,
        "intermediate_size": "d_ff",
        "type_vocab_size": Field("num_segments", default=2),
        "layer_norm_eps": Field("norm_eps", default=1e-12),
        "hidden_act": Field("feedforward", ACTIVATIONS, "gelu"),
    }
    fixed = FIXED
    required = {"position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True}
    prefix = "bert."
    rules = (
        *encoder_rules("bert."),
        Rule("bert.embeddings.position_embeddings", "stack.positions.table"),
        *head_rules(
            {"cls.predictions.transform.dense": "head.transform", "cls.predictions.transform.LayerNorm": "head.norm"},
            "cls.predictions.bias",
            "cls.predictions.decoder",
        ),
        Rule("bert.pooler.dense", "head.pool"),
        Rule("classifier", "head.classify"),
        Rule("bert.pooler.dense", "next_sentence.pool"),
        Rule("cls.seq_relationship", "next_sentence.classify", Reversed()),
    )
    # Published models include the pooler and the next-sentence head, which neither masked tokens nor embeddings need.
    ignored: ClassVar[Sequence[str]] = (r"position_ids$", r"^bert\.pooler\.", r"^cls\.seq_relationship\.")

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"next_sentence": NEXT_SENTENCE in (hf.get("architectures") or [])}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"architectures": [NEXT_SENTENCE]} if config.next_sentence else {}


class RoBERTaFamily(BERTFamily, name="roberta"):
    """Liu et al. 2019 (arXiv 1907.11692). Its positions start at 2: the padding id plus one."""

    architectures = {
        "encoder": "RobertaForMaskedLM",
        "encoder-classifier": "RobertaForSequenceClassification",
        "encoder-headless": "RobertaModel",
    }
    fields = {
        **{name: field for name, field in BERTFamily.fields.items() if name != "max_position_embeddings"},
        # Its masked-language-model head always has this activation.
        "hidden_act": Field("feedforward", {"gelu": "gelu"}, "gelu"),
    }
    required = {**BERTFamily.required, "pad_token_id": 1}
    prefix = "roberta."
    rules = (
        *encoder_rules("roberta."),
        Rule("roberta.embeddings.position_embeddings", "stack.positions.table", WithoutFirst(2)),
        *head_rules(
            {"lm_head.dense": "head.transform", "lm_head.layer_norm": "head.norm"}, "lm_head.bias", "lm_head.decoder"
        ),
        Rule("classifier.dense", "head.pool"),
        Rule("classifier.out_proj", "head.classify"),
    )
    ignored = (r"position_ids$", r"^roberta\.pooler\.")

    @classmethod
    def read(cls, hf: HF) -> dict[str, Any]:
        return {"context_length": hf["max_position_embeddings"] - 2}

    @classmethod
    def write(cls, config: ModelConfig) -> HF:
        return {"max_position_embeddings": config.context_length + 2}


class XLMRobertaFamily(RoBERTaFamily, name="xlm-roberta"):
    """Conneau et al. 2019 (arXiv 1911.02116): RoBERTa for a hundred languages."""

    architectures = {
        "encoder": "XLMRobertaForMaskedLM",
        "encoder-classifier": "XLMRobertaForSequenceClassification",
        "encoder-headless": "XLMRobertaModel",
    }


class CamemBERTFamily(RoBERTaFamily, name="camembert"):
    """Martin et al. 2019 (arXiv 1911.03894): RoBERTa for French, with the same tensor names."""

    architectures = {
        "encoder": "CamembertForMaskedLM",
        "encoder-classifier": "CamembertForSequenceClassification",
        "encoder-headless": "CamembertModel",
    }


LAYER = "distilbert.transformer.layer.{layer}."


class DistilBERTFamily(Family, name="distilbert"):
    """Sanh et al. 2019 (arXiv 1910.01108): BERT without segments."""

    architectures = {
        "encoder": "DistilBertForMaskedLM",
        "encoder-classifier": "DistilBertForSequenceClassification",
        "encoder-headless": "DistilBertModel",
    }
    fields = {
        "vocab_size": "vocab_size",
        "dim": "d_model",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "hidden_dim": "d_ff",
        "max_position_embeddings": "context_length",
        "activation": Field("feedforward", ACTIVATIONS, "gelu"),
    }
    fixed = {**FIXED, "norm_eps": 1e-12, "pooling": "relu"}
    required = {"sinusoidal_pos_embds": False, "tie_word_embeddings": True}
    prefix = "distilbert."
    rules = (
        Rule("distilbert.embeddings.word_embeddings", "embedding.table"),
        Rule("distilbert.embeddings.position_embeddings", "stack.positions.table"),
        Rule("distilbert.embeddings.LayerNorm", "stack.embedding_norm"),
        Rule(LAYER + "attention.q_lin", BLOCK + "attention.query"),
        Rule(LAYER + "attention.k_lin", BLOCK + "attention.key"),
        Rule(LAYER + "attention.v_lin", BLOCK + "attention.value"),
        Rule(LAYER + "attention.out_lin", BLOCK + "attention.output"),
        Rule(LAYER + "sa_layer_norm", BLOCK + "attention_residual.norm"),
        Rule(LAYER + "ffn.lin1", BLOCK + "feedforward.up"),
        Rule(LAYER + "ffn.lin2", BLOCK + "feedforward.down"),
        Rule(LAYER + "output_layer_norm", BLOCK + "feedforward_residual.norm"),
        *head_rules(
            {"vocab_transform": "head.transform", "vocab_layer_norm": "head.norm"},
            "vocab_projector.bias",
            "vocab_projector",
        ),
        Rule("pre_classifier", "head.pool"),
        Rule("classifier", "head.classify"),
    )
    ignored = (r"position_ids$",)
