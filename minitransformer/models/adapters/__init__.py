"""Adapters: small modules that are trained in place of a model's own weights."""

from minitransformer.models.adapters.base import Adapter, freeze_matching, name_pattern
from minitransformer.models.adapters.lora import LoRA
from minitransformer.models.adapters.soft_prompt import SoftPrompt

__all__ = ["Adapter", "LoRA", "SoftPrompt", "freeze_matching", "name_pattern"]
