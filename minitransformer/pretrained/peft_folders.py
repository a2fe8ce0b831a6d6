"""Folders of the `peft` library: a LoRA, or a soft prompt, for a checkpoint of a known family."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.adapters import Adapter, LoRA, SoftPrompt
from minitransformer.models.adapters.base import of_new_head
from minitransformer.models.adapters.lora import LowRankUpdate
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model
from minitransformer.pretrained.families import Family, families_of
from minitransformer.pretrained.rules import Rule, Transposed, TransposedThirds
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.settings import Chosen

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PROMPT = "base_model.model.", "prompt_embeddings"
UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": None}
"""settings of peft's LoRA with the values that ours has"""
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}

Places = dict[str, tuple[Rule, tuple[str, ...]]]
"""By the name of a module in the file: its rule, and our modules that it becomes"""


def save_adapter(model: Model, folder: Path, family: str, base: str) -> None:
    """Write the adapter of `model` to the new folder `folder`, for its base, which `family` can hold.

    `base` is the name of that. Raises `UserError` for what peft's format cannot hold.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists: choose another folder")
    if of_new_head(model):
        raise UserError("the head that was trained beside the adapter has no place in its folder: merge the run")
    if model.config.adapter.variant is SoftPrompt:
        tensors, about = _prompt_tuning(model)
    elif model.config.adapter.variant is LoRA:
        tensors, about = _lora(model, _places(family, model.config.base))
    else:
        raise UserError(f"peft has no adapter {model.config.adapter.name!r}: export the merged model")
    common = {"task_type": TASKS.get(model.config.topology), "base_model_name_or_path": base, "inference_mode": True}
    with files.writing(folder, "choose another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(folder) as partial:
            (partial / PEFT_CONFIG).write_text(json.dumps({**common, **about}, indent=2) + "\n", encoding="utf-8")
            files.write_tensors(partial / PEFT_WEIGHTS, {name: t.detach().contiguous() for name, t in tensors.items()})


def _places(family: str, config: ModelConfig) -> Places:
    """The matrices of a member of `family`."""
    found: Places = {}
    for rule in Family.named(family).rules_for(config):
        for source, targets in () if rule.tensors else rule.expanded(config):
            if source.endswith(".weight"):
                names = tuple(target.removesuffix(".weight") for target in targets)
                found[source.removesuffix(".weight")] = rule, names
    return found


def _lora(model: Model, places: Places) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings: LoRA.Settings = model.config.adapter.settings
    if settings.also_train is not None:
        raise UserError("lora_also_train has trained weights that an adapter's folder has no place for: merge the run")
    modules, updates = dict(model.named_modules()), _updates_in(model)
    left = set(updates)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for source, (rule, targets) in places.items():
        if not left & set(targets):
            continue
        found = [updates[target] for target in targets if target in updates]
        left -= set(targets)
        ranks[source] = settings.rank * len(found)
        blocks = iter(range(0, ranks[source], settings.rank))
        parts = []
        for target in targets:  # B of each map, in columns of its own
            linear: Any = modules[target]
            wide = torch.zeros(linear.out_features, ranks[source])
            if target in updates:
                wide.narrow(1, next(blocks), settings.rank).copy_(updates[target].b.detach())
            parts.append(wide)
        b = rule.transform.save(tuple(parts), model.config)
        tensors[f"{PREFIX}{source}.lora_A.weight"] = torch.cat([update.a for update in found])
        tensors[f"{PREFIX}{source}.lora_B.weight"] = b.mT if _is_transposed(rule) else b
    if left:
        raise UserError(f"the format has no place for the update of {min(left)}: merge the run, and export it")
    return tensors, _lora_config(settings, ranks, any(_is_transposed(places[source][0]) for source in ranks))


def _updates_in(model: Model) -> dict[str, LowRankUpdate]:
    """The update of each linear map that has one."""
    modules = model.named_modules()
    return {name.removesuffix(".lora"): module for name, module in modules if isinstance(module, LowRankUpdate)}


def _is_transposed(rule: Rule) -> bool:
    """Whether the file holds [in, out] matrices; peft stores an update of them as any other."""
    return isinstance(rule.transform, Transposed | TransposedThirds)


def _lora_config(settings: LoRA.Settings, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    others = {source: rank for source, rank in ranks.items() if rank != settings.rank}
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": {source: settings.alpha * rank / settings.rank for source, rank in others.items()},
        "fan_in_fan_out": transposed,
        "bias": "none",
    }


def _prompt_tuning(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, embedding = model.config, dict(model.named_parameters())
    if config.topology != "decoder":
        raise UserError(f"there is no folder for the soft prompt of topology {config.topology!r}, only of a decoder")
    if config.scaled_embeddings or config.embedding_scale != 1.0:
        raise UserError("scaled embeddings would scale peft's prompt too: there is no folder for this soft prompt")
    about = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": config.adapter.settings.tokens,
        "token_dim": config.d_model,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
    }
    return {PROMPT: embedding["embedding.prompt"]}, about


def read_adapter(folder: Path, base: ModelConfig) -> tuple[Chosen[Adapter], dict[str, Tensor]]:
    """The adapter in a folder of peft for a model of `base`, and its weights by our names.

    Raises `UserError` for what ours cannot hold, and for an adapter of another kind of model.
    """
    hf = read_checkpoint_json(folder / PEFT_CONFIG)
    try:
        tensors = load_file(folder / PEFT_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / PEFT_WEIGHTS} cannot be read ({error}): give a folder of peft") from None
    kind = hf.get("peft_type")
    try:
        if kind == "PROMPT_TUNING":
            prompt = tensors[PROMPT].float()
            return SoftPrompt.choose(tokens=len(prompt)), {"embedding.prompt": prompt}
        if kind == "LORA":
            return _read_lora(hf, tensors, base)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{folder} is no complete folder of peft ({type(error).__name__}: {error})") from None
    raise UserError(f"{folder} has peft_type {kind!r}: only LORA and PROMPT_TUNING can be opened")


@torch.no_grad()
def fill_adapter(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Set the adapter of `model` to `weights`; raises `UserError` for other names or shapes."""
    ours = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shapes, wanted = ({name: list(each.shape) for name, each in group.items()} for group in (weights, ours))
    if faults := sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name)):
        name = faults[0]
        raise UserError(f"the adapter has {name} of shape {shapes.get(name)}, and the base needs {wanted.get(name)}")
    for name, parameter in ours.items():
        parameter.copy_(weights[name])


def _read_lora(
    hf: Mapping[str, Any], tensors: dict[str, Tensor], base: ModelConfig
) -> tuple[Chosen[Adapter], dict[str, Tensor]]:
    for name, usual in UNSUPPORTED.items():
        if hf.get(name, usual) not in (usual, None, [], {}):
            raise UserError(f"the adapter has {name} {hf[name]!r}, which LoRA here does not have: merge it with peft")
    sources = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    families = [_places(family, base) for family in families_of(base)]
    places = next((each for each in families if sources <= each.keys()), None)
    if places is None or not sources:
        raise UserError(f"the adapter's {min(sources, default='file')} is no matrix of the base: give its own base")
    rank, alpha = max(len(tensors[f"{PREFIX}{source}.lora_A.weight"]) for source in sources), float(hf["lora_alpha"])
    weights = {
        name: weight for source in sources for name, weight in _updates(source, hf, tensors, places, base, rank, alpha)
    }
    names = sorted(name.removesuffix(".lora.a") for name in weights if name.endswith(".lora.a"))
    pattern = "|".join(map(re.escape, names))
    dropout = float(hf.get("lora_dropout") or 0.0)
    return LoRA.choose(pattern=pattern, rank=rank, alpha=alpha, dropout=dropout), weights


def _updates(
    source: str,
    hf: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    places: Places,
    base: ModelConfig,
    rank: int,
    alpha: float,
) -> Iterator[tuple[str, Tensor]]:
    """A and B of each of our maps that the module `source` becomes, padded with zeros to `rank`."""
    rule, targets = places[source]
    a, b = (tensors[f"{PREFIX}{source}.lora_{which}.weight"].float() for which in "AB")
    own = len(a)
    scale = _of_module(hf.get("alpha_pattern"), source, alpha) / (math.sqrt(own) if hf.get("use_rslora") else own)
    if (ratio := scale * rank / alpha) != 1:
        b = b * ratio
    parts = rule.transform.load(b.mT if _is_transposed(rule) else b, base)
    for target, part in zip(targets, parts, strict=True):
        yield f"{target}.lora.a", torch.cat([a, a.new_zeros(rank - own, a.size(1))])
        yield f"{target}.lora.b", torch.cat([part, part.new_zeros(len(part), rank - own)], dim=1)


def _of_module(patterns: Any, source: str, usual: float) -> float:
    """The value for a module among peft's `patterns`, which match the ends of names."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", source):
            return float(value)
    return usual
