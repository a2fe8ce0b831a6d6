"""Public checkpoints: read into our models, and written so that others can open them."""

from minitransformer.pretrained.checkpoint import generation_config, load, save

__all__ = ["generation_config", "load", "save"]
