"""A real HTTP proxy in front of a chain's RPC that can behave as badly as the ones out there."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.payments.http_server import Reply, as_json, serve

__all__ = ["Proxy", "open_proxy"]

Bend = Callable[[dict[str, Any], Reply], Reply]


@dataclass
class Proxy:
    """`before` may answer a question in the chain's place, `after` may change what the chain answered."""

    url: str
    before: Callable[[dict[str, Any]], Reply | None] = lambda question: None
    after: Bend = lambda question, reply: reply
    results: dict[str, object] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def heal(self) -> None:
        """Behave well again."""
        self.before, self.after = (lambda question: None), (lambda question, reply: reply)
        self.results.clear()

    def rate_limit(self) -> None:
        """Answer everything with HTTP status 429."""
        self.before = lambda question: Reply(b"slow down", 429, {"retry-after": "1"})

    def rate_limit_in_json(self) -> None:
        """Answer everything with EIP-1474's "limit exceeded"."""
        error = {"code": -32005, "message": "daily request count exceeded"}
        self.before = lambda question: as_json({"jsonrpc": "2.0", "id": question["id"], "error": error})

    def slow_down(self, seconds: float) -> None:
        """Answer after some time."""

        def wait(question: dict[str, Any]) -> None:
            time.sleep(seconds)

        self.before = wait

    def answer(self, method: str, result: object) -> None:
        """Answer a method with this result."""
        self.results[method] = result

    def swallow(self, method: str) -> None:
        """Pass a method's questions on, and hang up instead of passing the answer back."""
        self.after = lambda question, reply: Reply(None) if question["method"] == method else reply


@contextmanager
def open_proxy(target: str) -> Iterator[Proxy]:
    """A proxy in front of the RPC at `target`."""
    proxy = Proxy("")

    def answer(body: bytes) -> Reply:
        question = json.loads(body)
        proxy.asked.append(question["method"])
        if question["method"] in proxy.results:
            return as_json({"jsonrpc": "2.0", "id": question["id"], "result": proxy.results[question["method"]]})
        reply = proxy.before(question)
        return reply if reply is not None else proxy.after(question, _forward(target, body))

    with serve(answer) as url:
        proxy.url = url
        yield proxy


def _forward(target: str, body: bytes) -> Reply:
    request = urllib.request.Request(target, body, {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - our own loopback URL
            return Reply(response.read(), response.status)
    except urllib.error.HTTPError as error:
        return Reply(error.read(), error.code)
