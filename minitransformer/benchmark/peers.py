"""Peers: nanoGPT from a checkout, and Hugging Face transformers if installed.

Each uses the optimizer, precision and batches of its own training script.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer.benchmark.shape import Shape
from minitransformer.errors import UserError


@dataclass(frozen=True)
class NanoGPT:
    """A checkout of https://github.com/karpathy/nanoGPT; only its `model.py` is imported."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> NanoGPT:
        """The checkout at `path`, not imported yet; raises `UserError` if there is none."""
        remedy = "name a checkout of github.com/karpathy/nanoGPT"
        file = path / "model.py"
        if not file.is_file():
            raise UserError(f"{path} is not a nanoGPT checkout, because it has no model.py: {remedy}")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read as Python ({error}): {remedy}") from None
        classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        if not {"GPT", "GPTConfig"} <= classes:
            raise UserError(
                f"{path} is not a nanoGPT checkout, because its model.py has no classes GPT and GPTConfig: {remedy}"
            )
        return cls(path.resolve())

    def module(self) -> Any:
        """Its `model.py`, imported."""
        spec = importlib.util.spec_from_file_location("nanogpt_model", self.path / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for their module there
        spec.loader.exec_module(module)
        return module

    def model(self, shape: Shape, device: str) -> Any:
        """Its model of this shape, untrained."""
        module = self.module()
        config = module.GPTConfig(
            block_size=shape.context_length,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_embd=shape.d_model,
            dropout=shape.dropout,
            bias=shape.bias,
        )
        return module.GPT(config).to(device)


def transformers_model(shape: Shape, device: str) -> Any:
    """Hugging Face's GPT-2 of this shape, untrained. Its linear layers and norms always have biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    return model.to(device)
