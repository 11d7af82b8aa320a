"""Inbound streams: bounded per peer, and nothing that a handler raises reaches the host (trap 1)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost

from azu.errors import NetworkError, ProtocolError, TrustError
from azu.overlay.faults import settle, shielded
from azu.overlay.negotiate import accept
from azu.overlay.streams import OverlayStream

__all__ = ["MAX_STREAMS_PER_PEER", "Inbound"]

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER = 256  # inbound streams of one peer with a handler running; more are reset
LIBRARY_SECONDS = 60.0  # libp2p's own handlers (DHT, identify, ping) are cut off after this: they may wait for ever

Handler = Callable[[OverlayStream], Awaitable[None]]


class Inbound:
    """Stands between the swarm and all handlers, libp2p's own included."""

    def __init__(self, host: BasicHost, count_violation: Callable[[str], None]) -> None:
        self._host = host
        self._count_violation = count_violation
        self._running: Counter[str] = Counter()
        self._ours: set[str] = set()
        self._deadlines: dict[int, trio.CancelScope] = {}
        host.get_network().set_stream_handler(self._on_stream)

    def add(self, protocol: str, handler: Handler) -> None:
        """Run `handler` for inbound streams of `protocol`."""

        async def serve(net_stream: INetStream) -> None:
            scope = self._deadlines.get(id(net_stream))
            if scope is not None:
                scope.deadline = float("inf")  # ours may run as long as it likes
            await self._serve(OverlayStream(net_stream, _peer_of(net_stream), protocol), handler)

        self._host.set_stream_handler(TProtocol(protocol), serve)

    async def _on_stream(self, net_stream: INetStream) -> None:
        peer_id = _peer_of(net_stream)
        if self._running[peer_id] >= MAX_STREAMS_PER_PEER:
            await _reset(net_stream)
            return
        self._running[peer_id] += 1
        try:
            with trio.move_on_after(LIBRARY_SECONDS) as scope:
                self._deadlines[id(net_stream)] = scope
                handlers: Any = self._host.multiselect.handlers
                protocol = TProtocol(await accept(net_stream, handlers))
                net_stream.set_protocol(protocol)
                await handlers[protocol](net_stream)
            if scope.cancelled_caught:
                await _reset(net_stream)
        except Exception as error:  # a border: nothing may reach the host
            logger.debug("inbound stream of %s: %r", peer_id, error)
            await _reset(net_stream)
        finally:
            del self._deadlines[id(net_stream)]
            self._running[peer_id] -= 1
            if not self._running[peer_id]:
                del self._running[peer_id]

    async def _serve(self, stream: OverlayStream, handler: Handler) -> None:
        try:
            await handler(stream)
        except Exception as error:  # a border: nothing may reach the host
            self._on_error(stream, settle(error) if isinstance(error, BaseExceptionGroup) else error)
            await stream.reset()
        except BaseExceptionGroup as group:
            await stream.reset()
            self._on_group(stream, group)
        except BaseException:
            await stream.reset()
            raise
        else:
            await stream.aclose()

    def _on_group(self, stream: OverlayStream, group: BaseExceptionGroup[BaseException]) -> None:
        """Report the errors of a group that holds a cancellation (or an interrupt) too, and let that go on."""
        errors, rest = group.split(Exception)
        if errors is not None:
            self._on_error(stream, settle(errors))
        if rest is not None:
            raise rest

    def _on_error(self, stream: OverlayStream, error: BaseException) -> None:
        if isinstance(error, (ProtocolError, TrustError)):
            self._count_violation(stream.peer_id)
            logger.warning("%s from %s: %s [%s]", stream.protocol, stream.peer_id, error, error.code)
        elif isinstance(error, NetworkError):
            logger.debug("%s from %s: %s", stream.protocol, stream.peer_id, error)
        else:
            logger.error("handler of %s failed (peer %s)", stream.protocol, stream.peer_id, exc_info=error)


def _peer_of(net_stream: Any) -> str:
    return str(net_stream.muxed_conn.peer_id)


async def _reset(net_stream: INetStream) -> None:
    with shielded(1.0):
        try:
            await net_stream.reset()
        except Exception as error:  # best effort
            logger.debug("reset: %r", error)
