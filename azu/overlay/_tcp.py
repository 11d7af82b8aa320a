"""libp2p's TCP transport, with reads that are buffered, writes that tell, dials from a port of our choice, and IPv6."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp import tcp as upstream
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr

from azu.overlay._link import READ_BYTES
from azu.overlay.faults import shielded

__all__ = ["BufferedTCP", "BufferedTCPStream"]

logger = logging.getLogger(__name__)

# The kernel takes no more than about so much beyond what is on its way: on a slow uplink a token's states would have to
# wait behind whatever it has taken of a prompt or a file.
_UNSENT_BYTES = 256 * 1024
MAX_LOOKUPS = 8  # of names at once: each holds a thread until the system's resolver gives up
MAX_ADDRESSES = 8  # of one name that are tried
CLOSE_SECONDS = 1.0
_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


class BufferedTCPStream(TrioTCPStream):
    """Upstream makes two socket reads per Noise message (its length, then its body); this one makes few."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self._buffer = memoryview(b"")
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._remote = _endpoint(stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        """Where the other end is; upstream does not know for IPv6. None if it had gone before it was asked."""
        return self._remote

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

    def __init__(self) -> None:
        super().__init__()
        self._lookups = trio.CapacityLimiter(MAX_LOOKUPS)

    # IP address of a peer -> where a dial to it leaves from; None leaves that to the system
    source_of: Callable[[str], tuple[str, int] | None] = staticmethod(lambda host: None)

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """As upstream, from where `source_of` says, and with names as this system knows them."""
        family, host, *rest = str(maddr).split("/")[1:]
        if family in _FAMILIES:
            return await self._dial_any(await self._looked_up(family, host, rest))
        source = self.source_of(host) if family in ("ip4", "ip6") else None
        if source is not None:
            try:
                return await self.dial_from(maddr, source)
            except OpenConnectionError:  # the port has a connection to that very address already, or just had one
                logger.debug("dial to %s not from %s", maddr, source)
        return await self.dial_from(maddr, None)

    async def _looked_up(self, family: str, name: str, rest: list[str]) -> list[Multiaddr]:
        """The addresses that a name stands for; upstream asks a DNS server only, and never /etc/hosts."""
        ask = partial(socket.getaddrinfo, name, None, _FAMILIES[family], socket.SOCK_STREAM)
        try:
            found = await trio.to_thread.run_sync(ask, limiter=self._lookups, abandon_on_cancel=True)
        except (OSError, ValueError) as error:  # ValueError: what can be no name, such as one with a NUL
            raise OpenConnectionError(f"the name {name} cannot be looked up: {error}") from None
        hosts = dict.fromkeys((f"ip{6 if ':' in str(where[0]) else 4}", str(where[0])) for *_, where in found)
        return [Multiaddr("/".join(("", *each, *rest))) for each in list(hosts)[:MAX_ADDRESSES] if "%" not in each[1]]

    async def _dial_any(self, addresses: list[Multiaddr]) -> IRawConnection:
        """Dial all at once: one family may lead nowhere. The first that answers wins."""
        won: list[IRawConnection] = []
        failed: list[OpenConnectionError] = []

        async def attempt(address: Multiaddr) -> None:
            try:
                connection = await self.dial(address)
            except OpenConnectionError as error:
                failed.append(error)
                return
            won.append(connection)
            nursery.cancel_scope.cancel()

        chosen: IRawConnection | None = None
        try:
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(attempt, address)
            chosen = won[0] if won else None
        finally:  # others may have been as fast, and we may be cancelled
            for each in won:
                if each is not chosen:
                    with shielded(CLOSE_SECONDS):
                        await each.close()
        if chosen is None:
            raise failed[0] if failed else OpenConnectionError("the name has no usable address")
        return chosen

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


def _endpoint(stream: trio.SocketStream) -> tuple[str, int] | None:
    try:
        host, port, *_ = stream.socket.getpeername()
    except OSError:
        return None
    return host.partition("%")[0], port  # of a link-local address the interface is of no interest


def _set_flags(sock: trio.socket.SocketType) -> None:
    """As upstream, and IPv6 sockets take no IPv4: each family is listened to as the operator says, and told as such."""
    _set_reuse_flags(sock)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


_set_reuse_flags = upstream._set_reuse_flags
upstream._set_reuse_flags = _set_flags  # looked up by name, for listeners and for dials from a port
