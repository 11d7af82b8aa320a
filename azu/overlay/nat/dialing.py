"""Direct dials that differ from the swarm's own: from the port that we listen on, as responder, or only to try."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.network.exceptions import SwarmException
from multiaddr import Multiaddr

from azu.errors import NetworkError
from azu.overlay._patches import AzuSwarm
from azu.overlay._tcp import BufferedTCP
from azu.overlay.addresses import interface_hosts, parse_peer_id
from azu.overlay.faults import mapped, shielded
from azu.overlay.negotiate import negotiate
from azu.overlay.streams import OverlayStream

if TYPE_CHECKING:
    from libp2p.abc import IRawConnection

__all__ = ["DirectDials", "is_public"]

_STREAM_SECONDS = 5.0
_IDENTIFY_SECONDS = 2.0
_CLOSE_SECONDS = 1.0

Endpoint = tuple[str, int]


class DirectDials:
    """Dials over TCP that need no DHT and no relay. Made once per swarm: it decides where ordinary dials leave from."""

    def __init__(self, swarm: AzuSwarm, tcp: BufferedTCP) -> None:
        self._swarm = swarm
        self._tcp = tcp
        tcp.source_of = self.source_of

    @property
    def is_listening(self) -> bool:
        """Whether others can connect at all."""
        return any(listener.get_addrs() for listener in self._swarm.listeners.values())

    def listening(self, family: str) -> Endpoint | None:
        """Where this node listens on ip4 or ip6, which may be a wildcard; None where it does not."""
        for listener in self._swarm.listeners.values():
            for address in listener.get_addrs():
                parts = str(address).split("/")
                if parts[1] == family:
                    return parts[2], int(parts[4])
        return None

    def source_of(self, host: str) -> Endpoint | None:
        """Where a dial to `host` should leave from.

        A node without a public address leaves from the port that it listens on, so that its router's mapping is the one
        that strangers can use. Between public nodes, and in one network, that would only make two dials at once
        collide.
        """
        family = "ip6" if ":" in host else "ip4"
        is_outside = ipaddress.ip_address(host).is_global
        if not is_outside or any(ipaddress.ip_address(each).is_global for each in interface_hosts(family)):
            return None
        return self.listening(family)

    def is_direct(self, peer_id: str) -> bool:
        """Whether there is a live connection to a peer that goes through no relay."""
        connections = self._swarm.get_connections(parse_peer_id(peer_id))
        return any(not each.is_closed and each.get_connection_type() == ConnectionType.DIRECT for each in connections)

    async def until_direct(self, peer_id: str) -> None:
        """Wait until there is one."""
        while not self.is_direct(peer_id):
            await self._swarm.connection_added.wait()

    def leaves_from_listener(self, peer_id: str) -> bool:
        """Whether a connection to a peer leaves from the port that we listen on."""
        return any(map(self._is_from_listener, self._swarm.get_connections(parse_peer_id(peer_id))))

    def _is_from_listener(self, connection: Any) -> bool:
        try:
            raw = connection.muxed_conn.secured_conn.conn.read_writer.read_write_closer
            host, port, *_ = raw.stream.stream.socket.getsockname()
        except (AttributeError, OSError):  # a circuit has no socket, and a closed one no name
            return False
        source = self.listening("ip6" if ":" in host else "ip4")
        return source is not None and source[1] == port

    async def open_stream(self, peer_id: str, protocol: str) -> OverlayStream:
        """A stream over whatever connection there is, relayed ones included, at once.

        Raises:
            NetworkError: there is none, or the peer does not speak the protocol.
        """
        with mapped(f"open {protocol} to {peer_id}"), trio.fail_after(_STREAM_SECONDS):
            return OverlayStream(await negotiate(self._swarm, parse_peer_id(peer_id), protocol), peer_id, protocol)

    async def identified(self, peer_id: str) -> Sequence[str]:
        """Wait until a peer has told its addresses, which it does as soon as it is connected; not for long.

        Returns what it speaks, which it tells with them; empty if it has not.
        """
        target = parse_peer_id(peer_id)
        with trio.move_on_after(_IDENTIFY_SECONDS):
            while not self._swarm.protocols_of(target):  # noqa: ASYNC110 - the peerstore has no event for it
                await trio.sleep(0.02)
        return self._swarm.protocols_of(target)

    def public_addresses(self, peer_id: str) -> list[str]:
        """Public addresses of a peer that it has told itself; none where it has told nothing."""
        try:
            known = [str(each) for each in self._swarm.known_addresses(parse_peer_id(peer_id))]
        except SwarmException:
            return []
        return [each for each in known if "p2p-circuit" not in each and is_public(each)]

    async def connect(self, peer_id: str, address: str) -> None:
        """A connection that leaves from our listening port. Raises what libp2p raises."""
        async with self._opened(address) as raw:
            await self._swarm.upgrade_outbound_raw_conn(raw, parse_peer_id(peer_id))

    async def connect_as_responder(self, peer_id: str, address: str) -> None:
        """The same, answering the handshake instead of beginning it. Raises what libp2p raises."""
        async with self._opened(address) as raw:
            muxed: Any = await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr(address))
            if str(muxed.peer_id) != peer_id:
                await muxed.close()
                raise NetworkError(f"{address} is {muxed.peer_id}, not {peer_id}")

    @contextmanager
    def expecting(self, peer_id: str, addresses: Sequence[str]) -> Iterator[None]:
        """While this lasts, we are client on what we accept from these addresses: a peer's half of a punched hole.

        DCUtR gives the roles, whoever's SYN arrives first
        (https://github.com/libp2p/specs/blob/master/relay/DCUtR.md).
        """
        target, table = parse_peer_id(peer_id), self._swarm.punching
        endpoints = [(parts[2], int(parts[4])) for parts in (each.split("/") for each in addresses)]
        mine = [each for each in endpoints if table.setdefault(each, target) is target]
        try:
            yield
        finally:
            for each in mine:
                del table[each]

    async def answers(self, peer_id: str, address: str) -> bool:
        """Whether a new connection, from a port of the system's choice, proves to be the peer's; it is closed then."""
        try:
            raw = await self._tcp.dial_from(Multiaddr(address), None)
        except Exception:  # libp2p raises a dozen types, and all of them mean no
            return False
        try:
            await self._swarm.upgrader.upgrade_security(raw, True, parse_peer_id(peer_id))
        except Exception:  # as above
            return False
        else:
            return True
        finally:
            with shielded(_CLOSE_SECONDS):
                await raw.close()

    @asynccontextmanager
    async def _opened(self, address: str) -> AsyncIterator[IRawConnection]:
        """A socket from our listening port, which is closed if what is done with it fails or is cancelled."""
        source = self.listening("ip6" if address.startswith("/ip6/") else "ip4")
        raw = await self._tcp.dial_from(Multiaddr(address), source)
        try:
            yield raw
        except BaseException:
            with shielded(_CLOSE_SECONDS):
                await raw.close()
            raise


def is_public(address: str) -> bool:
    """Whether a multiaddr begins with a public IP address, of one host."""
    _, family, host, *_ = [*address.split("/"), "", ""]
    if family not in ("ip4", "ip6"):
        return False
    parsed = ipaddress.ip_address(host)
    return parsed.is_global and not parsed.is_multicast
