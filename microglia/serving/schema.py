"""What requests and answers look like: OpenAI's chat and text completions, plus `pruning`, `keep_ratio` and sparsity.

What this server does not do is refused by name, never ignored. Only what cannot change an answer (`user`, `metadata`,
`service_tier`, …) is read over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from microglia.serving.job import Reason

Stop = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
Zero = Annotated[float, Field(ge=0, le=0)]
LARGEST_SEED = 2**63 - 1


class RequestModel(BaseModel):
    """Parent of what clients send: unknown names are refused, null is the same as leaving out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(RequestModel):
    """What goes over the stream beside the answer."""

    include_usage: bool = Field(False, description="Send the usage in one more chunk at the end.")
    include_obfuscation: bool = Field(False, description="Accepted, has no effect.")


class Request(RequestModel):
    """What chat and text completions have in common."""

    model: str = Field(description="A name that /v1/models lists.")
    stream: bool = Field(False, description="Send the answer piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: float = Field(0, ge=0, le=2, description="0, the default here, is greedy.")
    top_p: float = Field(1, ge=0, le=1)
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED, description="The same seed, the same answer.")
    stop: Stop = Field(default_factory=list, description="Up to 4 texts that end the answer.")
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="Share of heads to keep on average over prompts, for this request only."
    )
    pruning: bool = Field(True, description="false answers with every head.")
    n: Literal[1] = 1
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    user: str = Field("", description="Accepted, has no effect.")
    metadata: dict[str, str] = Field(default_factory=dict, description="Accepted, has no effect.")
    store: bool = Field(False, description="Accepted; nothing is ever stored.")
    safety_identifier: str = Field("", description="Accepted, has no effect.")
    prompt_cache_key: str = Field("", description="Accepted, has no effect.")
    prompt_cache_retention: str = Field("", description="Accepted, has no effect.")
    service_tier: str = Field("auto", description="Accepted, has no effect; there is one tier.")

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop) if stop)


class TextPart(RequestModel):
    """One part of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str = Field("", description="Accepted, has no effect.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(RequestModel):
    """The only format that is written."""

    type: Literal["text"]


class ChatRequest(Request):
    """A conversation whose next turn is to be written."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Longest answer; without it, what the server allows.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: Literal[False] = False
    response_format: TextFormat = TextFormat(type="text")

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionRequest(Request):
    """Prompts that are continued as they are, without a template."""

    prompt: str | Annotated[list[str], Field(min_length=1)] = Field(description="A complete prompt, or several.")
    max_tokens: int = Field(16, ge=1, description="Longest answer.")
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


# --- answers ----------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    """Tokens, heads and seconds; over several prompts the counts are sums and the seconds those of the slowest."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    sparsity: float = Field(description="1 − heads_kept / heads")
    heads_kept: int
    heads: int
    queued_seconds: float = Field(description="From arrival until the prompt was read.")
    seconds: float = Field(description="From reading the prompt to the last token.")


class ChatMessage(BaseModel):
    """The answer's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """What all kinds of choices have; a chunk has a reason only when the answer ends with it."""

    index: int = 0
    logprobs: None = None
    finish_reason: Reason | None = None


class Response(BaseModel):
    """What all answers and chunks have."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatChoice(Choice):
    """The answer to a conversation and how it ended."""

    message: ChatMessage
    finish_reason: Reason


class ChatCompletion(Response):
    """The whole answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Choice):
    """A chunk's part of the answer."""

    delta: Delta


class ChatChunk(Response):
    """One event of a streamed conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


class CompletionChoice(Choice):
    """The continuation of one prompt; `index` says of which."""

    text: str


class Completion(Response):
    """An answer, and when streaming each chunk of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "microglia"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether questions are answered, and how many are at it."""

    status: Literal["ok", "stopping"]
    waiting: int
    running: int


class ErrorDetail(BaseModel):
    """One sentence in `message`, and OpenAI's names for what it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail


def with_chunks(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema, and in it the shape of a streamed conversation's events, which no address returns as JSON."""
    chunk = ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    parts = chunk.pop("$defs")
    schema["components"]["schemas"] |= {**parts, "ChatChunk": chunk}
    return schema
