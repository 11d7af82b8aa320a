"""The body of POST /v1/chat/completions, checked.

What azu cannot do is refused by name instead of ignored, so that no application relies on it by mistake; a parameter at
the value that asks for nothing is fine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from annotated_types import MaxLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from azu.tickets import Sampling
from coordinator.api.errors import ApiError

__all__ = ["ChatRequest", "Strict", "parse_body", "parse_chat_request", "parse_object"]

B = TypeVar("B", bound="Strict")

# OpenAI takes 4 stop strings. The length bounds the work per token; none is longer than a line.
_MAX_STOPS = 4
_MAX_STOP_CHARS = 1_000
# A conversation with more turns fits no context; also bounds the work on hostile bodies.
_MAX_MESSAGES = 10_000
_MAX_PARTS = 1_000
# Neither CTRL's nor OpenAI's parameters need more digits, and equal requests should make equal tickets.
_DIGITS = 6
# A ticket wants top_p and repetition_penalty above 0. So small a top_p keeps the likeliest token alone, as 0 would.
_LEAST = 1e-6

_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls"}
)
# name: the values that ask for nothing (besides null)
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is None or isinstance(value, list):
        return value
    raise PydanticCustomError("content_type", "expected a string or a list of content parts")


class Strict(BaseModel):
    """Part of a body: nothing is coerced, and unknown fields of parts are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message's content; only text is understood."""

    type: str
    text: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "text":
            # Hostile input is echoed, so only its beginning.
            raise PydanticCustomError(
                "unsupported_content",
                "content parts of type '{kind}' are not supported: the models here read text only",
                {"kind": kind[:64]},
            )
        if kind == "text" and "text" not in data:
            raise PydanticCustomError("missing", "a text part needs 'text'")
        return data


class ChatMessage(Strict):
    """One turn. Other fields that clients echo from an earlier answer (refusal, audio, ...) are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Annotated[list[TextPart], MaxLen(_MAX_PARTS)] | None, BeforeValidator(_as_parts)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("no_content", "a message needs 'content'")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        # OpenAI renamed "system"; the models were trained before.
        role = "system" if self.role == "developer" else self.role
        content = None if self.content is None else "".join(part.text for part in self.content)
        extra = {"name": self.name, "tool_calls": self.tool_calls or None, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": content, **{key: value for key, value in extra.items() if value is not None}}


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


def _as_stops(value: object) -> object:
    value = [value] if isinstance(value, str) else value
    return [stop for stop in value if stop != ""] if isinstance(value, list) else value


_Stop = Annotated[str, Field(max_length=_MAX_STOP_CHARS)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class ChatRequest(Strict):
    """A chat completion request. Null counts as not given, as with OpenAI."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES), FailFast()]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[_Stop], Field(max_length=_MAX_STOPS), BeforeValidator(_as_stops)] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def template_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates know it."""
        return [message.for_template() for message in self.messages]

    def sampling(self, seed: int) -> Sampling:
        """How the last stage is to pick tokens; `seed` may be any integer."""
        return Sampling(
            temperature=round(self.temperature, _DIGITS),
            top_p=max(round(self.top_p, _DIGITS), _LEAST),
            top_k=max(self.top_k, 0),  # -1 is how some clients say "all"
            min_p=round(self.min_p, _DIGITS),
            repetition_penalty=max(round(self.repetition_penalty, _DIGITS), _LEAST),
            presence_penalty=round(self.presence_penalty, _DIGITS),
            frequency_penalty=round(self.frequency_penalty, _DIGITS),
            seed=seed % 2**63,
        )


def parse_chat_request(body: bytes, *, max_choices: int) -> ChatRequest:
    """Check a request's body.

    Raises:
        ApiError: status 400, naming the first thing that is wrong with it.
    """
    given = {name: value for name, value in parse_object(body).items() if value is not None}
    _refuse_unsupported(given)
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _from_pydantic(error) from error
    _check_together(request, max_choices)
    return request


def parse_body(body: bytes, kind: type[B]) -> B:
    """Check a body against a model; null counts as not given.

    Raises:
        ApiError: status 400, naming the first thing that is wrong with it.
    """
    given = {name: value for name, value in parse_object(body).items() if value is not None}
    for name in given:
        if name not in kind.model_fields:
            raise _unknown(name)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _from_pydantic(error) from error


def parse_object(body: bytes) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        ApiError: status 400, code "invalid_json".
    """
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(
            f"We could not parse the JSON body of your request: {error}",
            code="invalid_json",
            remedy="Send one JSON object, in UTF-8.",
        ) from error
    if not isinstance(data, dict):
        raise ApiError("The request's body is not a JSON object", code="invalid_json")
    return data


def _refuse_unsupported(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
            raise ApiError(
                f"Unsupported parameter: '{name}' is not supported here",
                code="unsupported_parameter",
                param=name,
                remedy="Leave it out of the request.",
            )
        if name not in ChatRequest.model_fields and name not in _UNSUPPORTED and name not in _IGNORED:
            raise _unknown(name)


def _unknown(name: str) -> ApiError:
    problem, remedy = f"Unknown parameter: '{name[:64]}'", "Leave it out of the request."
    return ApiError(problem, code="unknown_parameter", param=name[:64], remedy=remedy)


def _check_together(request: ChatRequest, max_choices: int) -> None:
    if request.n > max_choices:
        raise ApiError(
            f"Invalid 'n': {request.n} choices were asked for, and there are at most {max_choices}",
            code="integer_above_max_value",
            param="n",
            remedy="Send several requests.",
        )
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled",
            code="invalid_parameter_combination",
            param="stream_options",
            remedy="Set 'stream' to true, or leave it out.",
        )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported",
            code="invalid_parameter_combination",
            param="max_tokens",
            remedy="Keep 'max_completion_tokens'.",
        )


# pydantic's type of error -> OpenAI's code and words
_CODES: Mapping[str, tuple[str, Callable[[str, str], str]]] = {
    "missing": ("missing_required_parameter", lambda where, _: f"Missing required parameter: '{where}'"),
    "no_content": ("missing_required_parameter", lambda where, _: f"Missing required parameter: '{where}.content'"),
    "unsupported_content": ("unsupported_content", lambda where, text: f"Invalid '{where}': {text}"),
}


def _from_pydantic(error: ValidationError) -> ApiError:
    first: ErrorDetails = error.errors(include_input=False, include_url=False)[0]
    kind, text = first["type"], first["msg"]
    where = _path(first["loc"])
    remedy = ""
    if kind in _CODES:
        code, words = _CODES[kind]
        message = words(where, text)
        remedy = "Send its text instead." if kind == "unsupported_content" else ""
    elif kind.endswith("_type"):
        code, message = "invalid_type", f"Invalid type for '{where}': {text}"
    else:
        code, message = "invalid_value", f"Invalid '{where}': {text}"
    where = f"{where}.content" if kind == "no_content" else where
    return ApiError(message, code=code, param=where, remedy=remedy)


def _path(location: tuple[int | str, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")
