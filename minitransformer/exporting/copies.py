"""An export, opened again: what a certificate asks of it, whatever runtime opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.models.encoder import EncoderLM
from minitransformer.models.model import Model
from minitransformer.text.chat_template import ChatTemplate, Message, usual_names
from minitransformer.text.tokenizers import Tokenizer


class CopyError(UserError):
    """A copy that its runtime cannot open, or that is not what was trained; the command line exits with 1."""

    exit_code = 1


class Copy:
    """An export opened in `runtime`; what its format does not hold is None.

    `is_foreign` says whether code of others has run it, or it has only been read back by ours.
    """

    runtime: str
    is_foreign = True

    def weights(self) -> Mapping[str, Tensor] | None:
        """The weights in the files, by the names of our model."""
        return None

    def outputs(self, *inputs: Tensor) -> Tensor:
        """What the model computes: `Exported.outputs`."""
        raise NotImplementedError

    def greedy(self, prompt: list[int], count: int, ends: Sequence[int]) -> list[int] | None:
        """The most likely tokens after a prompt, or for a source, up to one of `ends`, as the runtime writes them."""
        return None

    def token_ids(self, text: str) -> list[int] | None:
        """The ids of a text with what the tokenizer puts around it."""
        return None

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]] | None:
        """A conversation up to the next answer, as a text and as ids."""
        return None

    def ends(self) -> set[int] | None:
        """The ids at which the runtime ends a text by itself."""
        return None


def outputs_of(model: Model, *inputs: Tensor) -> Tensor:
    """The logits, of tokens if a model has several heads, or its hidden states."""
    computed: Tensor = model.token_logits(*inputs) if isinstance(model, EncoderLM) else model(*inputs)
    return computed


def read_back_chat(
    source: str | None, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[str, list[int]] | None:
    """A conversation by the template in the files of a copy, where only this package can read them."""
    if source is None:
        return None
    template = ChatTemplate(source, "the template of the copy", usual_names(tokenizer))
    written = [Message(**each) for each in messages]
    return template.render(written, add_generation_prompt=True), template.encode_prompt(written, tokenizer)
