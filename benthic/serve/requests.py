"""What clients may send, after OpenAI's API: unknown fields are refused, never ignored, and every number is bounded.

Fields with no effect on the answer (``user``, ``metadata`` and the like) are accepted, for they only name the caller.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from benthic.serve.errors import ApiError, bad

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_TOOLS = 128
MAX_BIASED = 1024

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Token], Field(min_length=1)]
_Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED),
]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_Stops = Annotated[list[_Stop], Field(max_length=4)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    """No unknown fields, no numbers given as text, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Asked(Strict):
    """What the two ways of asking for text have in common; the last three are this server's own."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: _Stop | _Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: _Bias | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for a request with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however many were given."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Strict):
    """Text, the only kind of content that these models read."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: str


class FunctionCall(Strict):
    """What an assistant called, with its arguments as JSON text."""

    name: _Name
    arguments: str


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"]
    function: FunctionCall


_Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class ChatMessage(Strict):
    """A message of a conversation. The last three are of answers that clients send back; they say nothing here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_Part], Field(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in ("text", "refusal"):
                raise ValueError(f"parts of type {str(part.get('type'))[:40]!r} are not read, and no address is opened")
        return content

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("content: missing")
        if self.role != "assistant" and (self.refusal or any(isinstance(p, RefusalPart) for p in self._parts)):
            raise ValueError("refusal: only in a message of the assistant")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only in a message of the assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: needed in a message of a tool, and only there")
        return self

    @property
    def text(self) -> str:
        """Its parts joined; empty for calls without words."""
        if self._parts:
            return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in self._parts)
        return self.content if isinstance(self.content, str) else self.refusal or ""

    @property
    def _parts(self) -> list[TextPart | RefusalPart]:
        return self.content if isinstance(self.content, list) else []


class Function(Strict):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """Functions are the only tools."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function to call."""

    name: _Name


class NamedTool(Strict):
    """The tool to call."""

    type: Literal["function"]
    function: NamedFunction


class SchemaOfAnswer(Strict):
    """A JSON schema with a name."""

    name: _Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """No form asked for."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON after a schema; it is kept to whether or not ``strict`` is set."""

    type: Literal["json_schema"]
    json_schema: SchemaOfAnswer


class RegexFormat(Strict):
    """Text that a regular expression matches from beginning to end; this server's own."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1, max_length=16384)]


Format = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")
]  # fmt: skip


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give it or max_completion_tokens, not both")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice: only with tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no function {self.tool_choice.function.name!r} in tools")
        if self.response_format not in (None, TextFormat(type="text")) and self.forced_tools:
            raise ValueError("response_format: not together with a tool_choice that forces a call")
        return self

    @property
    def limit(self) -> int | None:
        """New tokens asked for at most, under either name."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def usable_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """Those of which one must be called; none if the model may choose."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return self.usable_tools if self.tool_choice == "required" else []


class CompletionRequest(Asked):
    """``POST /v1/completions``."""

    prompt: str | list[str] | _Ids | list[_Ids]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: must equal n; choices are not ranked")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo")
        if self.echo and self.stream:
            raise ValueError("echo: not in a stream")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many, as text or as ids, always as a list."""
        return _as_list(self.prompt)


class EmbeddingRequest(Strict):
    """``POST /v1/embeddings``."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: str | list[str] | _Ids | list[_Ids]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """One or many, as text or as ids, always as a list."""
        return _as_list(self.input)


def _as_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    texts: list[str | list[int]] = [one for one in given if not isinstance(one, int)]
    return texts or [[one for one in given if isinstance(one, int)]]


_Model = TypeVar("_Model", bound=BaseModel)


def parse(kind: type[_Model], body: bytes) -> _Model:
    """A request out of its JSON. Raises 400 that names the field at fault; JSON of any depth, size or encoding."""
    try:
        content = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise bad("the body must be a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """The first mistake in OpenAI's shape. What was sent is not repeated: it may be long, or private."""
    detail = min(error.errors(include_url=False, include_input=False), key=lambda detail: len(detail["loc"]))
    param = _path(detail["loc"]) or None
    message = detail["msg"].removeprefix("Value error, ")
    if param is None:  # told by a rule about several fields, which begins with the one at fault
        name, colon, rest = message.partition(": ")
        param, message = (name, rest) if colon else (None, message)
    if detail["type"] == "extra_forbidden":
        message = "no such field; a chat template comes with the model" if param == "chat_template" else "no such field"
    return bad(f"{param}: {message}" if param else message, param)


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].content`` from pydantic's location, without the alternatives of a union that it tried."""
    path = ""
    for place, part in enumerate(location):
        before = location[place - 1] if place else ""
        if before == "response_format" or (isinstance(before, int) and "content" in location[:place]):
            continue  # the tag of a union
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not _is_alternative(part):
            path += f".{part}" if path else part
    return path


def _is_alternative(part: str) -> bool:
    return part in {"str", "int", "NamedTool"} or part[0].isupper()
