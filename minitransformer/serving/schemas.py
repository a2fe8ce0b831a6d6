"""What requests may say: OpenAI's fields, and the settings of our sampling processors beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from minitransformer.serving.limits import MOST_INPUTS

Name = Annotated[str, Field(min_length=1, max_length=200)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Inputs = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS)]
)
InputTexts = str | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)]
Biases = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


class Strict(BaseModel):
    """A body without other fields, and without a value that would have to be converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has beside its texts."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema that the answer keeps to; its name and description are for the reader."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class GenerationBody(BaseModel):
    """What completions and chats have in common. A further field is a setting of a sampling processor, as top_k."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: Name
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    logit_bias: Biases | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """for the log of requests only"""

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The stop strings; None if the request says nothing of them."""
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_json(self) -> bool:
        """Whether the text must be JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """Continue each prompt."""

    prompt: Inputs
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Strict):
    """A part of a message that has several."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """What one side says."""

    role: Annotated[str, Field(min_length=1, max_length=50)]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All parts of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """Answer the last message."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_INPUTS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class EmbeddingBody(Strict):
    """A vector for each text."""

    model: Name
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class ClassifyBody(Strict):
    """The classes of each text."""

    model: Name
    input: InputTexts


class TranslateBody(Strict):
    """What each text becomes."""

    model: Name
    input: InputTexts
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class TokenizeBody(Strict):
    """The tokens of a prompt, or of a conversation up to its next answer."""

    model: Name
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_INPUTS)] | None = None
    return_token_strs: bool = False


class FeedbackBody(Strict):
    """What a user says of an answer: a thumb, what it should have been, or both."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    index: Annotated[int, Field(ge=0)] = 0
    rating: Literal["up", "down"] | None = None
    correction: str | None = None
