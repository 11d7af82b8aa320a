"""JSON-RPC over HTTP, with several URLs of one chain: who fails, lies about the chain or is slow is left for a while.

A URL is asked for the chain's name before it is trusted, and again from time to time. Its path and query may be a key:
errors and logs name its host only.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import trio

from azu.errors import InputError, NetworkError, ProtocolError
from azu.logs import log

__all__ = ["ChainCheck", "Endpoint", "Limits", "Rpc", "RpcError"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MAX_URLS = 16
_MAX_ANSWER_BYTES = 4 << 20  # a Solana transaction with all its logs stays below 1 MiB
_MAX_MESSAGE = 300
_CHECK_EVERY_S = 300.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0
_LIAR_PAUSE_S = 300.0
# "limit exceeded" of EIP-1474, and what nodes behind a proxy say.
_RATE_CODES = (-32005, 429)


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient an `Rpc` is.

    Args:
        request_s: seconds for one request at one URL.
        patience_s: seconds for one question, all tries together.
    """

    request_s: float = 10.0
    patience_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ChainCheck:
    """How a URL shows that it serves the chain: what `method` must answer, and the chain's name for people."""

    method: str
    expected: str
    name: str


class RpcError(NetworkError):
    """The node understood the question and answered with an error of its own; `number` is JSON-RPC's code."""

    def __init__(self, host: str, number: int, message: str) -> None:
        super().__init__(f"{host} answered: {message}", code="rpc_error")
        self.number = number
        self.reply = message


class Endpoint:
    """One URL. `ready_at` is trio's clock, before which it is left alone; `problem` is why, until it answers again."""

    def __init__(self, url: str, check: ChainCheck, client: httpx.AsyncClient, limits: Limits) -> None:
        self.host = _host(url)
        self.ready_at = 0.0
        self.problem: NetworkError | None = None
        self._url = url
        self._check = check
        self._client = client
        self._limits = limits
        self._ids = itertools.count(1)
        self._checked_until = -1.0
        self._failures = 0

    async def call(self, method: str, *params: Any, read: Callable[[Any], T]) -> T:
        """What the node answers, once it has shown that it is of the right chain.

        Raises:
            RpcError: it answered with an error. NetworkError: it did not answer, or not as it should.
        """
        try:
            if trio.current_time() >= self._checked_until:
                await self._check_chain()
            answer = read(await self._post(method, params))
        except ProtocolError as error:
            raise self._failed(error.message, "rpc_bad_answer") from error
        self._failures, self.problem = 0, None
        return answer

    async def _check_chain(self) -> None:
        try:
            told = await self._post(self._check.method, ())
        except RpcError as error:
            raise self._failed(f"does not tell its chain: {error.reply}", "rpc_bad_answer") from error
        if told != self._check.expected:
            log(logger, logging.ERROR, "an RPC serves another chain and is left out", host=self.host,
                told=str(told)[:80], expected=self._check.expected)  # fmt: skip
            raise self._failed(f"serves another chain than {self._check.name}", "rpc_wrong_chain", _LIAR_PAUSE_S)
        self._checked_until = trio.current_time() + _CHECK_EVERY_S

    async def _post(self, method: str, params: Sequence[Any]) -> Any:
        number = next(self._ids)
        question = {"jsonrpc": "2.0", "id": number, "method": method, "params": list(params)}
        try:
            with trio.fail_after(self._limits.request_s):
                status, headers, body = await self._exchange(question)
        except trio.TooSlowError as error:
            raise self._failed(f"does not answer within {self._limits.request_s:g} s", "rpc_timeout") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._failed(f"cannot be reached ({type(error).__name__})", "rpc_unavailable") from error
        if status == 429:
            raise self._failed("limits the rate of requests", "rpc_rate_limited", _seconds(headers.get("retry-after")))
        if status != 200:
            raise self._failed(f"answers with HTTP status {status}", "rpc_unavailable")
        return self._result(body, number)

    async def _exchange(self, question: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        body = bytearray()
        async with self._client.stream("POST", self._url, json=question) as response:
            with trio.CancelScope() as reading:  # which ends the generators in httpx too; leaving the loop does not
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > _MAX_ANSWER_BYTES:
                        reading.cancel()
        if len(body) > _MAX_ANSWER_BYTES:
            raise self._failed(f"answers with more than {_MAX_ANSWER_BYTES} bytes", "rpc_bad_answer")
        return response.status_code, response.headers, bytes(body)

    def _result(self, body: bytes, number: int) -> Any:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._failed("answers with what is no JSON", "rpc_bad_answer") from error
        if not isinstance(answer, dict) or answer.get("id") != number:
            raise self._failed("answers another question", "rpc_bad_answer")
        problem = answer.get("error")
        if isinstance(problem, dict):
            code, message = problem.get("code"), str(problem.get("message"))[:_MAX_MESSAGE]
            if code in _RATE_CODES:
                raise self._failed("limits the rate of requests", "rpc_rate_limited")
            raise RpcError(self.host, code if isinstance(code, int) else 0, message)
        if problem is not None or "result" not in answer:
            raise self._failed("answers neither a result nor an error", "rpc_bad_answer")
        return answer["result"]

    def _failed(self, what: str, code: str, pause: float | None = None) -> NetworkError:
        backoff = min(_FIRST_PAUSE_S * 2**self._failures, _LAST_PAUSE_S)
        self._failures = min(self._failures + 1, 16)
        self._checked_until = -1.0  # what comes back may be another node
        self.ready_at = trio.current_time() + (backoff if pause is None else pause)
        self.problem = NetworkError(f"{self.host} {what}", code=code)
        return self.problem


class Rpc:
    """Asks the first URL that is ready; the others step in for it. Leaving it closes the connections.

    Args:
        urls: http or https, the preferred one first.

    Raises:
        InputError: code "bad_rpc_url".
    """

    def __init__(self, urls: Sequence[str], check: ChainCheck, *, limits: Limits = Limits()) -> None:
        if not 0 < len(urls) <= _MAX_URLS:
            raise InputError(f"{len(urls)} RPC URLs were given, not 1 to {_MAX_URLS}", code="bad_rpc_url")
        # A proxy that the environment names does not lead to this machine's own node.
        here = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
        # Compressed, a small answer could become a large one before it is measured.
        plain = {"accept-encoding": "identity"}
        self._client = httpx.AsyncClient(timeout=limits.request_s, mounts=here, headers=plain)
        self._limits = limits
        self._endpoints = [Endpoint(url, check, self._client, limits) for url in urls]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            await self._client.aclose()

    async def call(self, method: str, *params: Any, read: Callable[[Any], T]) -> T:
        """The answer of the first URL that gives one which `read` accepts.

        Args:
            read: makes a value of the JSON; raises ProtocolError where it is not what was asked for.

        Raises:
            RpcError: a node answered with an error of its own, which other nodes would give too.
            NetworkError: no URL answered in time; codes as in `azu.payments.base`.
        """
        deadline = trio.current_time() + self._limits.patience_s
        while True:
            now = trio.current_time()
            ready = [endpoint for endpoint in self._endpoints if endpoint.ready_at <= now]
            endpoint = ready[0] if ready else min(self._endpoints, key=lambda each: each.ready_at)
            if max(now, endpoint.ready_at) > deadline:
                raise self._nobody()
            await trio.sleep_until(endpoint.ready_at)
            try:
                return await endpoint.call(method, *params, read=read)
            except RpcError:
                raise
            except NetworkError as error:
                log(logger, logging.WARNING, "an RPC failed", reason=error.message, method=method)

    async def everywhere(self, ask: Callable[[Endpoint], Awaitable[T]]) -> list[T]:
        """What every single URL answers, for what must not rest on one of them.

        Raises:
            NetworkError: one of them did not answer.
        """
        return [await ask(endpoint) for endpoint in self._endpoints]

    def _nobody(self) -> NetworkError:
        """One error for all URLs; "rpc_unavailable" where they failed for several reasons."""
        problems = [endpoint.problem for endpoint in self._endpoints if endpoint.problem is not None]
        codes = {problem.code for problem in problems}
        return NetworkError(
            "; ".join(problem.message for problem in problems) or "no RPC has answered in time",
            code=codes.pop() if len(codes) == 1 else "rpc_unavailable",
            remedy="Try again in a minute; the coordinator's operator may name further RPC URLs",
        )


def _host(url: str) -> str:
    refused = InputError(
        "an RPC URL is not an http or https URL", code="bad_rpc_url", remedy="Write it like https://rpc.example.org/evm"
    )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise refused from error
    if parts.scheme not in ("http", "https") or not host:
        raise refused
    return host if port is None else f"{host}:{port}"


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds, within bounds; a date is not worth its parsing."""
    if header is None or not header.strip().isdecimal() or len(header) > 9:
        return None
    return min(float(header), _LAST_PAUSE_S)
