"""What clients may ask: OpenAI's names, and of them those that are done here. Anything else is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_dist.generate.json_schema import schema_text
from moe_dist.generate.options import SamplingOptions

Count = Annotated[int, Field(ge=1, le=2**31)]
Token = Annotated[int, Field(ge=0, le=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


class AnyJson(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class BySchema(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | AnyJson | BySchema, Field(discriminator="type")]


class SamplingRequest(_Strict):
    """How to go on: what all that write text have in common."""

    max_tokens: Count | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return None

    def sampling(self, max_tokens: int) -> SamplingOptions:
        """For the engine. Raises ValueError naming the option."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(stop),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
            json_schema=self._json_schema,
        )

    @property
    def _json_schema(self) -> str | None:
        wanted = self.response_format
        if isinstance(wanted, BySchema):
            return schema_text(wanted.json_schema.schema_)
        return schema_text({"type": "object"}) if isinstance(wanted, AnyJson) else None


class InferRequest(SamplingRequest):
    """`/infer`: a text to go on from, for whoever wants no more than that."""

    prompt: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class InferAnswer(BaseModel):
    text: str
    finish_reason: str
    usage: Usage


class _Request(SamplingRequest):
    model: str = Field(max_length=512)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    user: str | None = Field(None, max_length=512)
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None


class CompletionRequest(_Request):
    """`/v1/completions`. `prompt`: a text, several, token ids, or several lists of them."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False

    @property
    def prompts(self) -> list[str | list[int]]:
        found: Any = self.prompt
        return [found] if isinstance(found, str) or isinstance(found[0], int) else list(found)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def as_text(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: Error


ERROR = "What is wrong, in OpenAI's shape"
ERROR_AS_JSON: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": ERROR,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
}
"""Where an answer is text, an error is not."""


class TrainRequest(_Strict):
    """`/train`. `config`: a run file in the folder of trainings, or what one would hold."""

    config: Annotated[str, Field(min_length=1, max_length=1024)] | dict[str, Any]
    overrides: list[Annotated[str, Field(max_length=4096)]] = Field([], max_length=256, description="key=value each")
