"""libp2p's TCP transport, with reads that are buffered, writes that tell, and dials from a port of our choice."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr

from azu.overlay._link import READ_BYTES

__all__ = ["BufferedTCP", "BufferedTCPStream"]

logger = logging.getLogger(__name__)

# The kernel takes no more than about so much beyond what is on its way: on a slow uplink a token's states would have to
# wait behind whatever it has taken of a prompt or a file.
_UNSENT_BYTES = 256 * 1024


class BufferedTCPStream(TrioTCPStream):
    """Upstream makes two socket reads per Noise message (its length, then its body); this one makes few."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self._buffer = memoryview(b"")
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    async def read(self, n: int | None = None) -> bytes:
        """Up to n bytes; b"" at the end."""
        if not self._buffer:
            try:
                received = await self.stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError as error:
                raise ConnectionClosedError(f"connection reset: {error}", transport="tcp") from error
            except trio.ClosedResourceError:
                return b""
            if not received and n != 0:
                # Upstream's read_exactly would ask a hundred times more.
                raise ConnectionClosedError("connection closed", transport="tcp")
            if n is None or n >= len(received):
                return bytes(received)  # uncopied
            self._buffer = memoryview(received)
        data = self._buffer if n is None else self._buffer[:n]
        self._buffer = self._buffer[len(data) :]
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """All of data; upstream hides writes to a socket that we closed, which would look like success."""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"connection closed: {error}", transport="tcp") from error


class BufferedTCP(TCP):
    """TCP whose streams read through a buffer. trio sets TCP_NODELAY on both sides already."""

    # IP address of a peer -> where a dial to it leaves from; None leaves that to the system
    source_of: Callable[[str], tuple[str, int] | None] = staticmethod(lambda host: None)

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """As upstream, from where `source_of` says."""
        family, host = str(maddr).split("/")[1:3]
        source = self.source_of(host) if family in ("ip4", "ip6") else None
        if source is not None:
            try:
                return await self.dial_from(maddr, source)
            except OpenConnectionError:  # the port has a connection to that very address already, or just had one
                logger.debug("dial to %s not from %s", maddr, source)
        return await self.dial_from(maddr, None)

    async def dial_from(self, maddr: Multiaddr, source: tuple[str, int] | None) -> IRawConnection:
        """Dial from this address and port, or from what the system chooses."""
        dialled = super().dial(maddr) if source is None else super().dial_with_source(maddr, source)
        connection: Any = await dialled
        connection.stream = BufferedTCPStream(connection.stream.stream)
        raw: IRawConnection = connection
        return raw

    def create_listener(self, handler_function: Any) -> TCPListener:
        """As upstream."""

        async def handler(stream: Any) -> None:
            await handler_function(BufferedTCPStream(stream.stream))

        return super().create_listener(handler)
