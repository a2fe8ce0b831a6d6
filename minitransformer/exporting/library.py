"""Exports opened by the `transformers` library: models, tokenizers and chat templates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitransformer.exporting.copies import Copy, CopyError, outputs_of, read_back_chat
from minitransformer.pretrained.checkpoint import CONFIG, load
from minitransformer.pretrained.originals import CHAT
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.text.templates import read_template
from minitransformer.text.tokenizers.spelled import encode_with_special_tokens

OUTPUTS = ("prediction_logits", "logits", "last_hidden_state")
"""outputs of the library's models that are compared, the first that a model has"""


def class_of(folder: Path) -> tuple[Any, str]:
    """The library's class for the model in `folder`, and its version; or None, and why."""
    [architecture] = read_checkpoint_json(folder / CONFIG)["architectures"]
    try:
        import transformers

        return getattr(transformers, architecture), f"transformers {transformers.__version__}"
    except (AttributeError, ImportError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        return None, "transformers is not installed" if missing else f"transformers has no {architecture}"


class LibraryTexts(Copy):
    """The tokenizer of a folder, opened by the library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tokenizer(self) -> Any:
        """Raises `CopyError` if the library cannot open it."""
        with opening():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def token_ids(self, text: str) -> list[int] | None:
        with opening():
            return list(self.tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        if self.tokenizer.chat_template is None:
            return None
        with opening():
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text, list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class LibraryCopy(LibraryTexts):
    """A folder of safetensors, opened by the library."""

    def __init__(self, folder: Path, model_class: Any, runtime: str, start: int, **options: Any) -> None:
        super().__init__(folder)
        self.runtime, self.start = runtime, start
        with opening():
            self.model = model_class.from_pretrained(folder, local_files_only=True, **options).float().eval()

    def weights(self) -> Mapping[str, Tensor] | None:
        return dict(load(self.folder)[0].named_parameters())

    def outputs(self, *inputs: Tensor) -> Tensor:
        names = ("input_ids", "decoder_input_ids")
        with opening():
            output = self.model(**dict(zip(names, inputs, strict=False)))
        found: Tensor = next(output[name] for name in OUTPUTS if name in output)
        return found

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int, ends: Sequence[int]) -> list[int] | None:
        if not self.model.can_generate():
            return None
        from transformers import GenerationConfig

        ids = {"pad_token_id": ends[0], "eos_token_id": list(ends), "decoder_start_token_id": self.start}
        published, tokens = self.model.generation_config, torch.tensor([prompt])
        self.model.generation_config = GenerationConfig(max_new_tokens=count, do_sample=False, **ids)
        with opening():
            [written] = self.model.generate(tokens, attention_mask=torch.ones_like(tokens)).tolist()
        self.model.generation_config = published
        return written[1 if self.model.config.is_encoder_decoder else len(prompt) :]

    def ends(self) -> set[int] | None:
        if not self.model.can_generate():
            return None
        found = self.model.generation_config.eos_token_id
        return set(found if isinstance(found, list) else [] if found is None else [found])


class OwnTexts(Copy):
    """The tokenizer of a folder, read back by this package, because the library is not here."""

    is_foreign = False

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        self.folder, self.tokenizer = folder, tokenizer

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        path = self.folder / CHAT
        return read_back_chat(read_template(path) if path.is_file() else None, self.tokenizer, messages)

    def token_ids(self, text: str) -> list[int] | None:
        ids = encode_with_special_tokens(self.tokenizer, text) if text else []
        return self.tokenizer.framing.around(ids)


def opened_texts(folder: Path) -> Copy:
    """The tokenizer of a folder, opened by the library if it is here."""
    return OwnTexts(folder) if find_spec("transformers") is None else LibraryTexts(folder)


class OwnCopy(OwnTexts):
    """A folder that is only read back by this package."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(folder)
        self.runtime, self.model = f"minitransformer alone, as {why}", load(folder)[0]

    def weights(self) -> Mapping[str, Tensor] | None:
        return dict(self.model.named_parameters())

    def outputs(self, *inputs: Tensor) -> Tensor:
        return outputs_of(self.model, *inputs)


@contextmanager
def opening() -> Iterator[None]:
    """Suppress the library's warnings and progress bars, and turn its errors into a `CopyError`."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    except Exception as error:  # of the library, of its checks, of torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CopyError(
            f"the copy cannot be opened by transformers ({reason}): it was removed; choose another --format or --family"
        ) from None
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
