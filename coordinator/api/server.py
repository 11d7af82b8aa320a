"""Serving the application on a TCP port, with hypercorn."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import hypercorn.trio
import trio
from hypercorn.config import Config

from azu.errors import InputError
from coordinator.api.app import ApiApp

__all__ = ["serve_http"]

MAX_PORT = 65_535
BACKLOG = 256  # connections that wait to be accepted
# httpx keeps idle connections for 5 s; a server that closes first makes its next request fail.
IDLE_S = 75.0
# A client that does not read for so long is gone: its job holds memory in every stage.
STALLED_MS = 30_000
_ANY = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
# Between ending the jobs and cutting the connections: time for their last words.
LAST_WORDS_S = 1.0


async def serve_http(
    app: ApiApp,
    host: str,
    port: int,
    *,
    stop: trio.Event | None = None,
    grace_s: float = 3.0,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set or the call is cancelled; reports the URL by `task_status`.

    Setting `stop` refuses new connections and returns when the running answers are complete. Those that are not after
    `grace_s` seconds end with an error that says so. Cancelling ends everything at once.

    Args:
        port: 0 picks a free one.

    Raises:
        InputError: code "cannot_listen", where the address is not ours or in use.
    """
    stop = trio.Event() if stop is None else stop
    listener = await _listen(host, port)
    url = app.url = _url(listener)
    async with _present(app, "" if host in _ANY else url), trio.open_nursery() as nursery:
        if app.submissions is not None:
            await nursery.start(app.submissions.run)
        if app.unclaimed is not None:
            await nursery.start(app.unclaimed.run)
        nursery.start_soon(_cut_after_grace, app, stop, grace_s)

        async def serve(*, task_status: trio.TaskStatus[list[str]]) -> None:
            config = _config(listener, grace_s)
            await hypercorn.trio.serve(app, config, shutdown_trigger=stop.wait, task_status=task_status, mode="asgi")
            app.in_flight.cut()  # what runs without a connection
            nursery.cancel_scope.cancel()

        await nursery.start(serve)
        task_status.started(url)


@asynccontextmanager
async def _present(app: ApiApp, url: str) -> AsyncIterator[None]:
    """Show other coordinators that this one lives, until all that it runs is ended or let go."""
    async with trio.open_nursery() as nursery:
        if app.presence is not None:
            await nursery.start(app.presence.run, url)
        yield
        nursery.cancel_scope.cancel()


async def _cut_after_grace(app: ApiApp, stop: trio.Event, grace_s: float) -> None:
    await stop.wait()
    await trio.sleep(grace_s)
    app.in_flight.cut()


async def _listen(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port <= MAX_PORT:  # the resolver would take its last 16 bits
            raise OverflowError("a port lies between 0 and 65535")
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted connections inherit both. Not every kernel knows the second.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError, AttributeError):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error})",
            code="cannot_listen",
            remedy="Choose another address or port, or end the program that uses it; port 0 picks a free one.",
        ) from error
    return listener


def _config(listener: socket.socket, grace_s: float) -> Config:
    log = logging.getLogger(f"{__name__}.hypercorn")
    log.setLevel(logging.WARNING)  # it greets at INFO
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]  # hypercorn owns and closes it from here on
    config.backlog = BACKLOG
    config.errorlog = log
    config.include_server_header = False
    config.keep_alive_timeout = IDLE_S
    config.graceful_timeout = grace_s + LAST_WORDS_S
    return config


def _url(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    if host in _ANY:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
