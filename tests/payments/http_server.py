"""A small JSON-RPC server over HTTP in a thread of its own, for what stands in front of a chain in tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, NamedTuple

__all__ = ["Reply", "as_json", "serve"]


class Reply(NamedTuple):
    """`body` None hangs up without an answer."""

    body: bytes | None
    status: int = 200
    headers: Mapping[str, str] = {}


def as_json(value: object) -> Reply:
    """A JSON body."""
    return Reply(json.dumps(value).encode())


@contextmanager
def serve(answer: Callable[[bytes], Reply], *, threads: bool = True) -> Iterator[str]:
    """Answer POSTs on loopback with what `answer` makes of their bodies; yields the URL.

    Args:
        threads: one for each connection, so that a slow answer holds up no other; else one for all.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reply = answer(self.rfile.read(int(self.headers["content-length"])))
            if reply.body is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *args: Any) -> None:
            """Nobody reads it."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client had no patience
                self.close_connection = True

    server = (ThreadingHTTPServer if threads else HTTPServer)(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
