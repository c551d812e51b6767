"""What clients may ask, and how they are told that they may not: the subset of OpenAI's API that is served.

What would change the text and is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hybrid.engine import Sampling

LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Settings about the request, not about the text; ignored."""
ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Settings that are not implemented, and their values that ask for nothing."""
_STOPS = 4
COLD = 1e-5
"""A temperature below is greedy; logits divided by so little leave float32."""


class ApiError(Exception):
    """Becomes an error body. param: the setting that it is about. code: for programs, as OpenAI names it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def _stops(value: Any) -> Any:
    if value is None or value == []:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > _STOPS or not all(isinstance(s, str) and s for s in values):
        raise ValueError(f"must be a string or a list of at most {_STOPS} strings, none of them empty")
    return tuple(values)


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) > 1:
            raise ValueError(f"must be one prompt, got a list of {len(value)}: send one request for each")
        (value,) = value
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise ValueError("must be a string or a list of token numbers")


def _text(value: Any) -> Any:
    """OpenAI's list of content parts as the text that it stands for."""
    if isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(value) or not all(isinstance(text, str) for text in texts):
            raise ValueError('must be text: a string, or a list of parts {"type": "text", "text": …}')
        return "".join(map(str, texts))
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Settings(BaseModel):
    """What both endpoints take. None is what a setting is when it is left out."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raise ApiError for what is not implemented."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in LABELS:
                continue
            if name not in ONLY:
                raise ApiError(f"{name} is not a setting of this server", param=name)
            if value not in ONLY[name]:
                allowed = " or ".join(map(repr, ONLY[name]))
                raise ApiError(f"{name} can only be {allowed} here, got {value!r:.80}", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options are for stream = true", param="stream_options")

    @property
    def sampling(self) -> Sampling:
        """OpenAI's defaults: temperature 1 and the whole distribution."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < COLD:
            return Sampling()
        return Sampling(temperature, 0, 1.0 if self.top_p is None else self.top_p)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class ChatRequest(Settings):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def check(self) -> None:
        super().check()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ApiError(
                    "max_tokens and max_completion_tokens are the same setting: choose one", param="max_tokens"
                )
            self.max_tokens = self.max_completion_tokens


class CompletionRequest(Settings):
    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]


AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request; ApiError names the first thing that is wrong with it."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ApiError(message) from None
        place = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.80}"
        raise ApiError(f"{place}: {message}{got}", param=str(first["loc"][0])) from None
    asked.check()
    return asked
