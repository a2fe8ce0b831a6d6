"""Checkpoints that cannot be read, refused by their kind."""

from __future__ import annotations

from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.pretrained.families import HF, Family

# The end of the name of a `transformers` class, and what its models have in place of a language-model head.
HEADS = {
    "ForQuestionAnswering": "a question-answering head",
    "ForTokenClassification": "a token-classification head",
    "ForSequenceClassification": "a sequence-classification head",
    "ForMultipleChoice": "a multiple-choice head",
    "ForNextSentencePrediction": "a next-sentence head alone",
    "RewardModel": "a reward head",
}
# Fields of config.json that say, with any value but zero or null, what an unknown model is.
KINDS = {
    "n_shared_experts": "a mixture with shared experts",
    "num_shared_experts": "a mixture with shared experts",
    "shared_expert_intermediate_size": "a mixture with shared experts",
    "shared_intermediate_size": "a mixture with shared experts",
    "vision_config": "a model with an image encoder",
    "audio_config": "a model with an audio encoder",
    "ssm_cfg": "a model with state-space layers",
    "mamba_d_state": "a model with state-space layers",
    "state_size": "a model with state-space layers",
    "kv_lora_rank": "a model with latent attention",
}


def check_kind(hf: HF, path: Path) -> None:
    """Raises `UserError` with the kind of checkpoint that the configuration `hf` in the file `path` describes.

    Those that can be read pass.
    """
    quantised = hf.get("quantization_config") or hf.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        what = f"quantised ({method})" if isinstance(method, str) else "quantised"
        raise UserError(f"{path} is of a {what} checkpoint: give the one with its weights in full")
    model_type = hf["model_type"]
    if model_type not in Family.registry:  # a similar name would be another model
        known = f"known are {', '.join(Family.registry)}"
        kinds = [kind for field, kind in KINDS.items() if hf.get(field)]
        if kinds:
            raise UserError(f"{path} describes {kinds[0]} ({model_type}), which cannot be loaded: {known}")
        raise UserError(f"unknown model_type {model_type!r}: {known}")
    family = Family.named(model_type)
    named = hf.get("architectures")
    for name in named if isinstance(named, list) else []:
        heads = [head for ending, head in HEADS.items() if str(name).endswith(ending)]
        if heads and name not in family.architectures.values():
            raise UserError(
                f"{path} describes a model with {heads[0]} ({name}), which cannot be loaded: "
                f"of {model_type}, known are {', '.join(family.architectures.values())}"
            )
