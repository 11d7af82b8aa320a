"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status.

Whatever goes wrong behind a route becomes an `ApiError` here, and nowhere else. Details of our own faults go to the log
and not to the client.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from werkzeug.exceptions import HTTPException, MethodNotAllowed

from azu.errors import AzuError, CapacityError, InputError, InternalError, ModelError
from coordinator.api.settings import ApiSettings

__all__ = ["ApiError", "from_exception", "from_http_exception", "restarting", "shutting_down", "too_often"]

logger = logging.getLogger(__name__)

ROUTES = (
    "POST /v1/chat/completions, GET /v1/models, GET /v1/models/{id}, GET and POST /v1/pricing, POST /auth/challenge, "
    "GET and POST /auth/keys, DELETE /auth/keys/{id}, POST /deposit, GET /balance, GET /usage, POST /submit, "
    "GET /results/{job_id}, POST /models/shard, GET /models/status and GET /healthz"
)


class ApiError(InputError):
    """An answer other than 2xx.

    Args:
        status: the HTTP status.
        param: the request's field that is at fault, such as "messages[0].role".
        headers: what the answer carries besides, such as Retry-After.
        details: plain values for programs, under "azu" in the error.
    """

    default_code = "invalid_request"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        remedy: str = "",
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.status = status
        self.param = param
        self.headers = headers or {}
        self.details = details

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = "insufficient_quota" if self.status == HTTPStatus.PAYMENT_REQUIRED else kind  # as OpenAI calls it
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error if self.details is None else {**error, "azu": self.details}}


def from_exception(error: BaseException, settings: ApiSettings) -> ApiError:
    """Whatever a handler raised, as the answer to give; what nobody foresaw is logged with its traceback."""
    leaves = list(_leaves(error))
    known = next((leaf for leaf in leaves if isinstance(leaf, AzuError)), None)
    if any(isinstance(leaf, InternalError) or not isinstance(leaf, AzuError) for leaf in leaves):
        logger.error("a request failed", exc_info=error)
    if isinstance(known, ApiError):
        return known
    if known is None or isinstance(known, InternalError):
        return ApiError(
            "The coordinator failed to answer this request",
            status=500,
            code="internal",
            remedy="Try again; if it fails again, the coordinator's log says why.",
        )
    return _from_azu_error(known, settings)


def from_http_exception(error: HTTPException, method: str, path: str) -> ApiError:
    """Quart's own refusals: no such route, wrong method and the like."""
    status = error.code or 500
    if status == HTTPStatus.NOT_FOUND:
        return ApiError(f"Invalid URL ({method} {path})", status=404, code="unknown_url", remedy=f"There are {ROUTES}.")
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        return ApiError(
            f"Not allowed to {method} on {path}",
            status=405,
            code="method_not_allowed",
            remedy=f"Use {allowed}.",
            headers={"Allow": allowed},
        )
    phrase = HTTPStatus(status).phrase
    return ApiError(error.description or phrase, status=status, code=phrase.lower().replace(" ", "_"))


def shutting_down() -> ApiError:
    """What a request gets that outlives the coordinator's grace."""
    return ApiError(
        "The coordinator is shutting down and ended this answer",
        status=503,
        code="shutting_down",
        remedy="Send the request again when it is back.",
    )


def restarting(remedy: str = "Send the request again with the id of the last event as Last-Event-ID.") -> ApiError:
    """What a stream, or an answer with a key, ends with that can be gone on with."""
    return ApiError(
        "The coordinator is shutting down, and the answer can be gone on with when it is back",
        status=503,
        code="restarting",
        remedy=remedy,
        headers={"Retry-After": "5"},
    )


def too_often(wait_s: float) -> ApiError:
    """What a client gets that asks more often than one needs to."""
    return ApiError(
        "Too many requests of this kind from this address",
        status=429,
        code="rate_limit_exceeded",
        remedy=f"Try again in {math.ceil(wait_s)} s.",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )


def _from_azu_error(error: AzuError, settings: ApiSettings) -> ApiError:
    headers: dict[str, str] = {}
    if isinstance(error, InputError):
        status = 400
    elif isinstance(error, CapacityError):
        status = 503
        usual_s = settings.uncovered_retry_s if error.code == "model_not_covered" else settings.busy_retry_s
        headers["Retry-After"] = str(max(1, math.ceil(usual_s if error.retry_after_s is None else error.retry_after_s)))
    elif isinstance(error, ModelError):
        status = 400 if error.code == "no_chat_template" else 500
    else:  # a peer was out of reach, broke a protocol or is not to be trusted: to the client a bad gateway
        status = 502
    param = "messages" if error.code in ("bad_messages", "bad_chat_template") else None
    return ApiError(error.message, status=status, code=error.code, param=param, remedy=error.remedy, headers=headers)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
