"""GGUF files opened by llama.cpp, or read back where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from minitransformer import pretrained
from minitransformer.exporting.certificate import (
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
from minitransformer.exporting.copies import Copy, CopyError, greedy_by_logits, read_back_chat
from minitransformer.exporting.exported import Exported
from minitransformer.pretrained.gguf_files import STEPS, GGUFFile
from minitransformer.pretrained.gguf_vocabularies import TEMPLATE
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens

F32 = 0
"""the type of ggml for keys and values in full"""
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
        self.model, tokenizer = pretrained.load(path)
        assert tokenizer is not None
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def stored_logits(self, tokens: Tensor) -> Tensor:
        """The logits of the file as it is, its rounded weights included."""
        found: Tensor = self.model(tokens)
        return found

    @cached_property
    def unrounded(self) -> Callable[[Tensor], Tensor]:
        """The logits of the same file with its weights in full, which only differ by what is wrong."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "whole.gguf"
            self.made.write_as("f32", path)
            return self._opened(path)

    def _opened(self, path: Path) -> Callable[[Tensor], Tensor]:
        return pretrained.load(path)[0]

    @torch.inference_mode()
    def outputs(self, *inputs: Tensor) -> Tensor:
        return self.unrounded(*inputs)

    def token_ids(self, text: str) -> list[int] | None:
        ids = encode_with_special_tokens(self.tokenizer, text) if text else []
        return self.tokenizer.framing.around(ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        return read_back_chat(GGUFFile(self.path).metadata.get(TEMPLATE), self.tokenizer, messages)

    def ends(self) -> set[int] | None:
        return set(self.tokenizer.ends)


class LlamaCopy(ReadBack):
    """A GGUF file opened by llama.cpp."""

    is_foreign = True

    def __init__(self, path: Path, made: StoresWeights) -> None:
        import llama_cpp

        super().__init__(path, made)
        self.runtime = f"llama-cpp-python {llama_cpp.__version__}"
        self.llama = self._llama(path)

    def _llama(self, path: Path) -> Any:
        from llama_cpp import Llama

        length = self.made.exported.model.config.context_length
        settings: dict[str, Any] = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "logits_all": True}
        try:
            return Llama(str(path), n_gpu_layers=0, flash_attn=False, type_k=F32, type_v=F32, verbose=False, **settings)
        except (ValueError, RuntimeError) as error:
            raise CopyError(
                f"the copy cannot be opened by llama.cpp ({error}): it was removed; choose another --format"
            ) from None

    def _opened(self, path: Path) -> Callable[[Tensor], Tensor]:
        llama = self._llama(path)
        return lambda tokens: _logits(llama, tokens)

    def stored_logits(self, tokens: Tensor) -> Tensor:
        return _logits(self.llama, tokens)

    def greedy(self, prompt: list[int], count: int, ends: Sequence[int]) -> list[int] | None:
        return greedy_by_logits(lambda ids: self.outputs(torch.tensor([ids]))[0, -1], prompt, count, ends)

    def token_ids(self, text: str) -> list[int] | None:
        return list(self.llama.tokenize(text.encode(), add_bos=True, special=True))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        source = self.llama.metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        names: dict[str, Any] = {name: self._spelled(name) for name in ("eos_token", "bos_token")}
        text = Jinja2ChatFormatter(source, **names)(messages=list(messages)).prompt
        return text, list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def _spelled(self, name: str) -> str:
        number = self.llama.metadata.get(f"tokenizer.ggml.{name}_id")
        return "" if number is None else self.llama._model.token_get_text(int(number))

    def ends(self) -> set[int] | None:
        import llama_cpp

        vocab = llama_cpp.llama_model_get_vocab(self.llama.model)
        return {number for number in range(self.llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, number)}


def _logits(llama: Any, tokens: Tensor) -> Tensor:
    """The logits of each text, [batch, length, vocab_size]."""
    found = []
    for text in tokens.tolist():
        llama.reset()
        llama.eval(text)
        found.append(torch.from_numpy(llama.scores[: len(text)].copy()))
    return torch.stack(found)


def near_weights(exported: Exported, copy: Copy) -> Agreement:
    """Every weight in the file is as near to that of the run as its type can be."""
    assert isinstance(copy, ReadBack)
    ours, theirs = (
        {name: weight.detach() for name, weight in model.named_parameters()} for model in (exported.model, copy.model)
    )
    step = STEPS[copy.made.stored or "f32"]
    different = [name for name in ours if not _is_near(ours[name], theirs[name], step)]
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    found = f"{len(ours)} tensors as {copy.made.stored}, off by at most {worst:.1e}"
    found = f"{different[0]} is farther off than {copy.made.stored} can be" if different else found
    return Agreement("weights", not different, found, {"tensors": len(ours), "different": different, "largest": worst})


def _is_near(ours: Tensor, theirs: Tensor, step: float) -> bool:
    # The largest weight of a row is that of some block, whose scale is rounded to 16 bits; what is no matrix is f32.
    step = step + 2**-11 if step and ours.dim() > 1 else 1e-7
    return bool(((ours - theirs).abs() <= step * ours.abs().amax(-1, keepdim=True).clamp(min=1)).all())


def unrounded_logits(exported: Exported, copy: Copy) -> Agreement:
    """The file's logits with its weights in full are those of the run."""
    assert isinstance(copy, ReadBack)
    return same_logits(exported, copy, copy.made.tolerance)


@torch.inference_mode()
def rounded_logits(exported: Exported, copy: Copy) -> Agreement | None:
    """What rounding costs: KL of the file's own predictions; the runtime must compute what its weights say."""
    assert isinstance(copy, ReadBack)
    if copy.made.stored == "f32":
        return None
    [tokens] = compared_inputs(exported)
    ours, read, theirs = exported.outputs(tokens), copy.model(tokens), copy.stored_logits(tokens)
    error = float(divergences(read.double(), theirs.double()).mean())
    kl = divergences(ours.double(), theirs.double())
    found = f"as {copy.made.stored}, KL {float(kl.mean()):.1e} on average, at most {float(kl.max()):.1e}"
    figures = {"mean_kl": float(kl.mean()), "largest_kl": float(kl.max()), "mean_kl_of_products": error}
    return Agreement("rounding", error <= ROUNDED, found, figures)


COMPARISONS: tuple[CopyComparison, ...] = (
    near_weights,
    same_token_ids,
    unrounded_logits,
    rounded_logits,
    same_greedy_text,
    same_chat,
    same_ends,
)
