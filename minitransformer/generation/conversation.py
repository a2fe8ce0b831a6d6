"""A conversation with a decoder: its history, what of it fits the context, and answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.text.chat_template import ASSISTANT, SYSTEM, USER, ChatTemplate, Message
from minitransformer.text.tokenizers import Tokenizer

StreamText = Callable[[DecoderLM, Tokenizer, Sequence[int], SamplingConfig], Iterator[list[str]]]
"""`stream_text`, with what else it is given"""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are encoded for a model, and where its answers end."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @property
    def ending_tokenizer(self) -> Tokenizer:
        """The tokenizer, with the end of a turn among the tokens that end a text."""
        framing = self.tokenizer.framing
        ends = [token for token in self.template.end_ids(self.tokenizer) if token != self.tokenizer.end_of_text]
        return self.tokenizer.framed(replace(framing, other_ends=tuple(dict.fromkeys(ends))))

    def with_stops(self, sampling: SamplingConfig) -> SamplingConfig:
        """`sampling`, which stops at the end of a turn as text where that is no token of the tokenizer."""
        end = self.template.end_of_turn
        if end is None or end in self.tokenizer.special_tokens or end in self.template.special_tokens:
            return sampling
        return replace(sampling, stop=(*sampling.stop, end))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for the next answer."""
        return self.template.encode_prompt(messages, self.tokenizer)


@dataclass
class Conversation:
    """Messages so far, and the answers of `model` to further ones.

    Where the context has no room for the history and an answer, the oldest exchanges are dropped, the system message
    never; `note` is told.
    """

    model: DecoderLM
    format: ChatFormat
    sampling: SamplingConfig
    stream_text: StreamText
    note: Callable[[str], object]
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tokenizer = self.format.ending_tokenizer
        self._sampling = self.format.with_stops(self.sampling)

    def answer(self, content: str) -> Generator[str, None, None]:
        """The answer to what the user says, piece by piece; both become part of the history.

        Closed early, the answer is what was generated so far. Raises `UserError` for a message that does not fit the
        context, and leaves the history as it was.
        """
        messages, prompt = self._fitting([*self.messages, Message(USER, content)])
        room = self.model.config.text_length + 1 - len(prompt)  # the last token is generated, and not read
        sampling = replace(self._sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
        self.messages = messages
        answer = ""
        try:
            for [piece] in self.stream_text(self.model, self._tokenizer, prompt, sampling):
                answer += piece
                yield piece
        finally:
            self.messages.append(Message(ASSISTANT, answer))

    def _fitting(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The messages without the oldest exchanges that do not fit, and their prompt."""
        context = self.model.config.text_length
        most = context + 1 - min(self.sampling.max_new_tokens, context // 2)
        first = int(messages[0].role == SYSTEM)
        prompt, dropped = self.format.encode(messages), 0
        while len(prompt) > most and len(messages) - first > 1:
            messages = [*messages[:first], *messages[first + 2 :]]
            dropped += 2
            prompt = self.format.encode(messages)
        if len(prompt) > context:
            kept = " with the system message" if first else ""
            raise UserError(
                f"the message{kept} has {len(prompt)} tokens, and the model sees {context}, its answer included: "
                "shorten it"
            )
        if dropped:
            self.note(f"the model sees {context} tokens: the oldest {dropped} messages are dropped from here on")
        return messages, prompt
