"""Adapters: small modules that are trained in place of a model's own weights."""

from minitransformer.models.adapters.base import Adapter
from minitransformer.models.adapters.lora import LoRA

__all__ = ["Adapter", "LoRA"]
