"""Public checkpoints: read into our models, and written so that others can open them."""

from minitransformer.pretrained.checkpoint import load, save

__all__ = ["load", "save"]
