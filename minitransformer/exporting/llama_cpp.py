"""GGUF files opened by llama.cpp, or read back where it is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitransformer.architecture.pooling import POOLINGS as POOLED
from minitransformer.exporting.certificate import (
    TOLERANCE,
    Agreement,
    CopyComparison,
    compared_inputs,
    divergences,
    same_chat,
    same_ends,
    same_greedy_text,
    same_logits,
    same_token_ids,
)
from minitransformer.exporting.copies import Copy, outputs_of, read_back_chat
from minitransformer.exporting.exported import Exported
from minitransformer.exporting.hostile import PROMPTS, encodable
from minitransformer.exporting.llama_process import LlamaProcess
from minitransformer.models.model import Model
from minitransformer.pretrained.checkpoint import load_gguf
from minitransformer.pretrained.gguf_encoders import POOLING, POOLINGS
from minitransformer.pretrained.gguf_files import STEPS, GGUFFile
from minitransformer.pretrained.gguf_vocabularies import TEMPLATE
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens

ROUNDED = 0.02
"""largest mean KL between what a file's weights say and llama.cpp's products, which round activations too"""


class StoresWeights(Protocol):
    """A format that can write one model with its matrices stored in several ways."""

    exported: Exported
    stored: str | None
    tolerance: float

    def write_as(self, stored: str, path: Path) -> None: ...


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


class ReadBack(Copy):
    """A GGUF file that is only read back by this package."""

    is_foreign = False

    def __init__(self, path: Path, made: StoresWeights) -> None:
        self.runtime, self.path, self.made = "minitransformer alone, as llama-cpp-python is not installed", path, made
        self.file = GGUFFile(path)
        self.model, tokenizer = load_gguf(self.file)
        assert tokenizer is not None
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def stored_outputs(self, *inputs: Tensor) -> Tensor:
        """The outputs of the file as it is, its rounded weights included."""
        return outputs_of(self.model, *inputs)

    @cached_property
    def unrounded(self) -> Path:
        """The same file with its weights in full, whose outputs only differ by what is wrong."""
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name) / "whole.gguf"
        self.made.write_as("f32", path)
        return path

    @cached_property
    def _unrounded_model(self) -> Model:
        return load_gguf(GGUFFile(self.unrounded))[0]

    @torch.inference_mode()
    def outputs(self, *inputs: Tensor) -> Tensor:
        return outputs_of(self._unrounded_model, *inputs)

    def embedding(self, tokens: Tensor) -> Tensor:
        """What the file says is the embedding of a text, [1, features]."""
        [name] = [name for name, number in POOLINGS.items() if number == self.file.own.get(POOLING)]
        return POOLED[name](self.outputs(tokens), torch.ones_like(tokens, dtype=torch.bool))

    def token_ids(self, text: str) -> list[int] | None:
        ids = encode_with_special_tokens(self.tokenizer, text) if text else []
        return self.tokenizer.framing.around(ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        return read_back_chat(self.file.metadata.get(TEMPLATE), self.tokenizer, messages)

    def ends(self) -> set[int] | None:
        return set(self.tokenizer.ends) if self.made.exported.writes else None


class LlamaCopy(ReadBack):
    """A GGUF file opened by llama.cpp."""

    is_foreign = True

    def __init__(self, path: Path, made: StoresWeights) -> None:
        super().__init__(path, made)
        self.runtime = f"llama-cpp-python {version('llama_cpp_python')}"
        self.process = LlamaProcess()

    def _ask(self, method: str, path: Path, *arguments: Any) -> Any:
        return self.process.ask(method, path, self.made.exported.model.config.context_length, *arguments)

    def _outputs(self, path: Path, inputs: Sequence[Tensor]) -> Tensor:
        """The outputs for each row, which llama.cpp reads alone."""
        rows = list(zip(*(each.tolist() for each in inputs), strict=True))
        if (classes := self.made.exported.model.config.num_classes) is not None:
            return torch.stack([torch.from_numpy(self._ask("pooled", path, *row, classes)) for row in rows])
        return torch.stack([torch.from_numpy(self._ask("outputs", path, *row)) for row in rows])

    def outputs(self, *inputs: Tensor) -> Tensor:
        return self._outputs(self.unrounded, inputs)

    def stored_outputs(self, *inputs: Tensor) -> Tensor:
        return self._outputs(self.path, inputs)

    def embedding(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self._ask("pooled", self.unrounded, tokens[0].tolist()))[None]

    def greedy(self, prompt: list[int], count: int, ends: Sequence[int]) -> list[int] | None:
        found: list[int] = self._ask("greedy", self.unrounded, prompt, count, list(ends))
        return found

    def token_ids(self, text: str) -> list[int] | None:
        found: list[int] = self._ask("token_ids", self.path, text)
        return found

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        found: tuple[str, list[int]] | None = self._ask("chat", self.path, list(messages))
        return found

    def ends(self) -> set[int] | None:
        found: set[int] = self._ask("ends", self.path)
        return found if self.made.exported.writes else None


def near_weights(exported: Exported, copy: Copy) -> Agreement:
    """Every weight in the file is as near to that of the run as its type can be."""
    assert isinstance(copy, ReadBack)
    ours, theirs = (
        {name: weight.detach() for name, weight in model.named_parameters()} for model in (exported.model, copy.model)
    )
    step = STEPS[copy.made.stored or "f32"]
    same = [name for name in ours if name in theirs and theirs[name].shape == ours[name].shape]
    different = [name for name in ours if name not in same or not _is_near(ours[name], theirs[name], step)]
    worst = max((float((ours[name] - theirs[name]).abs().max()) for name in same), default=0.0)
    found = f"{len(ours)} tensors as {copy.made.stored}, off by at most {worst:.1e}"
    found = f"{different[0]} is farther off than {copy.made.stored} can be" if different else found
    return Agreement("weights", not different, found, {"tensors": len(ours), "different": different, "largest": worst})


def _is_near(ours: Tensor, theirs: Tensor, step: float) -> bool:
    # The largest weight of a row is that of some block, whose scale is rounded to 16 bits; what is no matrix is f32.
    step = step + 2**-11 if step and ours.dim() > 1 else 2**-22
    return bool(((ours - theirs).abs() <= step * ours.abs().amax(-1, keepdim=True).clamp(min=1)).all())


def unrounded_logits(exported: Exported, copy: Copy) -> Agreement:
    """The file's logits with its weights in full are those of the run."""
    assert isinstance(copy, ReadBack)
    return same_logits(exported, copy, copy.made.tolerance)


class TabledGELU(TorchFunctionMode):
    """While active, GELU is that of llama.cpp: its tanh approximation, from a table for arguments of 16 bits."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not F.gelu:
            return function(*args, **(kwargs or {}))
        [x] = args
        tabled = F.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x.abs() < 10, tabled, F.relu(x))


@torch.inference_mode()
def tabled_gelu(exported: Exported, copy: Copy) -> Agreement | None:
    """With GELU as llama.cpp has it, outputs are as near as those of models without it.

    Of half of them, as an argument may be rounded to the next number of 16 bits.
    """
    assert isinstance(copy, ReadBack)
    if not copy.is_foreign or copy.made.tolerance <= TOLERANCE:
        return None
    inputs = compared_inputs(exported)
    with TabledGELU():
        ours = exported.outputs(*inputs).double()
    differences = (ours - copy.outputs(*inputs).double()).abs().amax(-1) / ours.square().mean().sqrt()
    median = float(differences.median())
    found = f"relative error of at most {median:.1e} for half of the tokens, with llama.cpp's own GELU"
    return Agreement("tabled GELU", median <= TOLERANCE, found, {"median_difference": median, "tolerance": TOLERANCE})


@torch.inference_mode()
def rounded_logits(exported: Exported, copy: Copy) -> Agreement | None:
    """What rounding costs: KL of the file's own predictions; the runtime must compute what its weights say.

    Of hidden states it is their squared difference, of their squared length.
    """
    assert isinstance(copy, ReadBack)
    if copy.made.stored == "f32":
        return None
    inputs = compared_inputs(exported)
    ours, theirs = exported.outputs(*inputs).double(), copy.stored_outputs(*inputs).double()
    is_predicted = exported.model.config.topology != "encoder-headless"
    distances, name = (divergences, "KL") if is_predicted else (_squared_differences, "squared difference")
    error = float(distances(outputs_of(copy.model, *inputs).double(), theirs).mean())
    cost = distances(ours, theirs)
    found = f"as {copy.made.stored}, {name} {float(cost.mean()):.1e} on average, at most {float(cost.max()):.1e}"
    kind = "kl" if is_predicted else "squared_difference"
    figures = {f"mean_{kind}": float(cost.mean()), f"largest_{kind}": float(cost.max()), "mean_of_products": error}
    return Agreement("rounding", error <= ROUNDED, found, figures)


def _squared_differences(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().sum(-1) / ours.square().sum(-1)


@torch.inference_mode()
def same_embeddings(exported: Exported, copy: Copy) -> Agreement | None:
    """The runtime pools hidden states as `embed` does."""
    assert isinstance(copy, ReadBack)
    if exported.model.config.topology != "encoder-headless":
        return None
    worst = 0.0
    for text in PROMPTS:
        ids = exported.token_ids(encodable(exported.source, text))[: exported.model.config.text_length]
        tokens = torch.tensor([ids or [0]])
        ours = POOLED[exported.pooling](exported.outputs(tokens), torch.ones_like(tokens, dtype=torch.bool))
        worst = max(worst, float((ours - copy.embedding(tokens)).norm() / ours.norm()))
    found = f"{len(PROMPTS)} texts, pooling {exported.pooling!r}, relative error of at most {worst:.1e}"
    figures = {"largest_difference": worst, "tolerance": copy.made.tolerance}
    return Agreement("embeddings", worst <= copy.made.tolerance, found, figures)


COMPARISONS: tuple[CopyComparison, ...] = (
    near_weights,
    same_token_ids,
    unrounded_logits,
    tabled_gelu,
    rounded_logits,
    same_embeddings,
    same_greedy_text,
    same_chat,
    same_ends,
)
