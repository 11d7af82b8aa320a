"""This node in the network: connects peers, opens streams, and looks things up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID

from azu.errors import InputError, NetworkError
from azu.overlay._patches import AzuSwarm
from azu.overlay.addresses import (
    parse_dial_address,
    parse_peer_id,
    parse_peer_multiaddr,
)
from azu.overlay.dht import KAD, Dht
from azu.overlay.faults import mapped, shielded
from azu.overlay.inbound import Inbound
from azu.overlay.lookup import Trace
from azu.overlay.nat.reachability import Finding
from azu.overlay.nat.relay import RelayStatistics
from azu.overlay.nat.traversal import Traversal
from azu.overlay.negotiate import negotiate
from azu.overlay.streams import OverlayStream

__all__ = ["Overlay", "OverlayStatistics"]

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
GOODBYE_SECONDS = 2.0  # all connections together, when the overlay is left
ADDRESS_SECONDS = 3600  # how long a dialled address is remembered
BOOTSTRAP_SECONDS = 7 * 24 * 3600  # the same for a bootstrap node's, which the operator vouches for
PING = "/ipfs/ping/1.0.0"

Handler = Callable[[OverlayStream], Awaitable[None]]


@dataclass(frozen=True)
class OverlayStatistics:
    """A snapshot. connections: live ones; streams: open ones in both directions; violations: per peer id; banned: peer
    ids; refused: connections turned away by their address; evicted: idle ones closed for newcomers; records and
    provided_keys: stored here for others.
    """

    connections: int
    streams: int
    routing_table: int
    violations: Mapping[str, int]
    banned: tuple[str, ...]
    refused: int
    evicted: int
    records: int
    provided_keys: int


class Overlay:
    """This node in the network. Made by `open_overlay`, valid inside its `async with`."""

    _traversal: Traversal

    def __init__(self, host: BasicHost, swarm: AzuSwarm, dht: Dht) -> None:
        self.peer_id = str(host.get_id())
        self._host = host
        self._swarm = swarm
        self._dht = dht
        self._violations: Counter[str] = Counter()
        self._inbound = Inbound(host, self.count_violation)
        self._joined_through: set[ID] = set()

    @property
    def addrs(self) -> tuple[str, ...]:
        """Dialable multiaddrs with /p2p/<peer id>; wildcards expanded, loopback last."""
        return tuple(str(each) for each in self._host.get_addrs())

    @property
    def own_addresses(self) -> tuple[str, ...]:
        """The multiaddrs among them that lead here directly, without /p2p."""
        own = (each.removesuffix(f"/p2p/{self.peer_id}") for each in self.addrs)
        return tuple(each for each in own if "/p2p-circuit" not in each)

    @property
    def finding(self) -> Finding:
        """How others reach this node, as far as that is known."""
        return self._traversal.finding

    async def finding_changed(self) -> None:
        """Wait until `finding` has changed."""
        await self._traversal.changed()

    def handle(self, protocol: str, handler: Handler) -> None:
        """Run `handler` for each inbound stream of `protocol`; the stream is closed when it returns.

        What it raises ends that stream only: ProtocolError and TrustError count against the peer and reset the
        stream, NetworkError is logged at debug level, everything else with its traceback.
        """
        self._inbound.add(protocol, handler)

    async def bootstrap(self, multiaddrs: Sequence[str]) -> list[str]:
        """Dial known nodes in parallel, enter them into the routing table and fill it; the peer ids reached.

        Raises:
            InputError: a malformed multiaddr. NetworkError: none answered; it names each and why.
        """
        targets = [parse_peer_multiaddr(each) for each in multiaddrs]
        reached: list[str] = []
        failed: list[str] = []

        async def reach(peer_id: str, address: str) -> None:
            try:
                await self.connect(peer_id, [address])
                target = parse_peer_id(peer_id)
                self._host.get_peerstore().add_addrs(target, [parse_dial_address(address, peer_id)], BOOTSTRAP_SECONDS)
                await self._dht.add_peer(target)
                self._joined_through.add(target)
            except NetworkError as error:
                failed.append(f"{address} ({error.message})")
            else:
                reached.append(peer_id)

        async with trio.open_nursery() as nursery:
            for peer_id, address in set(targets):
                if peer_id != self.peer_id:
                    nursery.start_soon(reach, peer_id, address)
        if failed and not reached:
            raise NetworkError(
                f"no bootstrap node answered: {'; '.join(sorted(failed))}",
                code="bootstrap_unreachable",
                remedy="Check the addresses and that a bootstrap node runs there and is reachable from here",
            )
        if reached:
            await self._dht.refresh()
        return list(dict.fromkeys(reached))

    async def connect(self, peer_id: str, addrs: Sequence[str] = ()) -> None:
        """Have a connection to a peer; at once if there is one. Dials `addrs`, else what peerstore and DHT know.

        Raises:
            InputError: a malformed peer id or address. NetworkError: not reached within 10 s.
        """
        target = parse_peer_id(peer_id)
        given = [parse_dial_address(each, peer_id) for each in addrs]
        if self.is_connected(peer_id):
            await self._refresh(target, given)
            await self._traversal.upgrade(peer_id)
            return
        if peer_id == self.peer_id:
            raise InputError("a node cannot connect to itself", code="bad_peer_id")
        with mapped(f"reach {peer_id}", "The peer may be down, or behind a NAT or firewall"):
            with trio.fail_after(CONNECT_SECONDS):
                await self._dial(target, given)
        await self._traversal.upgrade(peer_id)

    async def _refresh(self, target: ID, given: Sequence[Any]) -> None:
        if given:
            self._host.get_peerstore().add_addrs(target, given, ADDRESS_SECONDS)
        await self._swarm.refresh(target, CONNECT_SECONDS)

    async def _dial(self, target: ID, given: Sequence[Any]) -> None:
        peerstore = self._host.get_peerstore()
        if given:
            peerstore.add_addrs(target, given, ADDRESS_SECONDS)
        try:
            await self._swarm.dial_peer(target, CONNECT_SECONDS)
        except Exception:
            if given:
                raise
            before = self._swarm.known_addresses(target)
            found = await self._dht.find_addresses(target)
            if self.is_connected(str(target)):
                return
            if set(found) <= set(before):
                raise
            await self._swarm.dial_peer(target, CONNECT_SECONDS)

    async def open_stream(
        self, peer_id: str, protocol: str, *, addrs: Sequence[str] = (), timeout: float = 10.0
    ) -> OverlayStream:
        """A new stream to a peer, connecting first if need be. The caller closes it.

        Raises:
            InputError: a malformed peer id or address.
            NetworkError: not within `timeout` seconds, or the peer does not speak `protocol`.
        """
        target = parse_peer_id(peer_id)
        with mapped(f"open {protocol} to {peer_id}"), trio.fail_after(timeout):
            await self.connect(peer_id, addrs)
            return OverlayStream(await negotiate(self._swarm, target, protocol), peer_id, protocol)

    def is_connected(self, peer_id: str) -> bool:
        """Whether a connection exists. One to a peer that was cut off, not closed, still counts (trap 6)."""
        return any(not each.is_closed for each in self._swarm.get_connections(parse_peer_id(peer_id)))

    def is_direct(self, peer_id: str) -> bool:
        """Whether there is a connection to a peer that goes through no relay."""
        return self._traversal.is_direct(peer_id)

    async def until_direct(self, peer_id: str) -> None:
        """Wait until there is a connection to a peer that goes through no relay."""
        await self._traversal.until_direct(peer_id)

    def peers_with(self, protocol: str) -> list[str]:
        """Peers with a direct connection that have told that they speak a protocol."""
        speaks = (peer for peer in self.connected_peers() if protocol in self._swarm.protocols_of(parse_peer_id(peer)))
        return [peer for peer in speaks if self.is_direct(peer)]

    def servers(self) -> dict[str, list[str]]:
        """Peers with a direct connection that serve the DHT, and the full multiaddrs at which others can dial them.

        Loopback addresses are left out unless this node has no others either.
        """
        is_local = all("/127.0.0.1/" in each or "/::1/" in each for each in self.own_addresses)
        found: dict[str, list[str]] = {}
        for peer_id in self.peers_with(KAD):
            known = [str(each) for each in self._swarm.known_addresses(parse_peer_id(peer_id))]
            kept = [each.removesuffix(f"/p2p/{peer_id}") for each in known if "/p2p-circuit" not in each]
            found[peer_id] = [
                f"{each}/p2p/{peer_id}"
                for each in dict.fromkeys(kept)
                if is_local or ("/127.0.0.1/" not in each and "/::1/" not in each)
            ]
        return found

    def remote_address(self, peer_id: str) -> str:
        """Where a peer's direct connection ends, as a multiaddr; empty where there is none."""
        return str(self._swarm.location_of(parse_peer_id(peer_id)) or "")

    def connected_peers(self) -> tuple[str, ...]:
        """Peer ids with a live connection."""
        return tuple(str(each) for each in self._swarm.get_connections_map() if self.is_connected(str(each)))

    async def disconnect(self, peer_id: str) -> None:
        """Close all connections to a peer; its streams end. No error if there is none."""
        with mapped(f"disconnect from {peer_id}"), shielded(GOODBYE_SECONDS):
            await self._swarm.close_peer(parse_peer_id(peer_id))

    async def put_record(self, key: str, value: bytes) -> None:
        """Store a value here and at the peers closest to its key (/<namespace>/<name>).

        Raises:
            InputError: unknown namespace, or a newer value is stored here. TrustError, ProtocolError: its
            validator refuses it, or it is over 16 KiB. NetworkError: no peer stored it.
        """
        await self._dht.put_record(key, value)

    async def get_record(self, key: str, *, timeout: float = 10.0) -> bytes | None:
        """The best value that the network and this node hold, validated; None if there is none in `timeout` s.

        Raises:
            InputError: unknown namespace.
        """
        return await self._dht.get_record(key, timeout)

    async def provide(self, key: bytes) -> None:
        """Announce that this node serves the content with this 32-byte digest. Keep to few keys: 8 per 10 s go
        out, later calls wait their turn, as servers silently drop more.

        Raises:
            InputError: not 32 bytes. NetworkError: no peer took it.
        """
        await self._dht.provide(key)

    async def providers(self, key: bytes, *, all_holders: bool = False, timeout: float = 10.0) -> tuple[str, ...]:
        """Peer ids other than ours that announced this 32-byte digest; they may be gone (48 h memory).

        all_holders: ask each of the 20 peers closest to the key, and not only until some have named providers. Where
            peers come and go, these few may not have heard of the latest providers.
        """
        return await self._dht.providers(key, timeout, all_holders=all_holders)

    async def trace(self, key: bytes, *, seeds: Sequence[str] | None = None, timeout: float = 15.0) -> Trace:
        """Look for the peers closest to a key (of a record, or a peer id's bytes), and tell who was asked for them.

        seeds: the peer ids to begin with; those closest that we know where omitted.

        Raises:
            InputError: a malformed peer id.
        """
        return await self._dht.trace(key, timeout, None if seeds is None else [parse_peer_id(each) for each in seeds])

    async def find_peer(self, peer_id: str) -> tuple[str, ...]:
        """The multiaddrs, with /p2p, at which the network knows a peer; none where it does not.

        Raises:
            InputError: a malformed peer id.
        """
        found = await self._dht.find_addresses(parse_peer_id(peer_id))
        return tuple(dict.fromkeys(f"{str(each).removesuffix(f'/p2p/{peer_id}')}/p2p/{peer_id}" for each in found))

    async def ping(self, peer_id: str) -> float:
        """Round-trip time in seconds, measured on a stream of its own.

        Raises:
            NetworkError: no answer within 10 s.
        """
        async with await self.open_stream(peer_id, PING) as stream:
            started = trio.current_time()
            with mapped(f"ping {peer_id}"), trio.fail_after(CONNECT_SECONDS):
                await stream.send_all(bytes(32))
                left = 32
                while left:
                    answer = await stream.receive_some(left)
                    if not answer:
                        raise NetworkError(f"{peer_id} did not answer the ping")
                    left -= len(answer)
            return trio.current_time() - started

    def relay_statistics(self) -> RelayStatistics | None:
        """What this node relays for others; None where it relays nothing."""
        return self._traversal.statistics()

    def statistics(self) -> OverlayStatistics:
        """A snapshot of connections, streams, routing table and violations."""
        live = [each for all_of in self._swarm.get_connections_map().values() for each in all_of if not each.is_closed]
        return OverlayStatistics(
            connections=len(live),
            streams=sum(len(each.get_streams()) for each in live),
            routing_table=self._dht.table_size(),
            violations=MappingProxyType(dict(self._violations)),
            banned=self._swarm.gate.banned,
            refused=self._swarm.gate.refused,
            evicted=self._swarm.room.evicted,
            records=self._dht.record_count,
            provided_keys=self._dht.provided_count,
        )

    def _keeps(self, peer_id: ID) -> bool:
        """Whether a connection that lies idle is of use all the same: who the peer is makes it so."""
        return (
            peer_id in self._joined_through
            or self._dht.is_neighbour(peer_id)
            or self._traversal.is_relaying(str(peer_id))
        )

    def count_violation(self, peer_id: str) -> None:
        """Note that a peer broke a protocol; one that does so again and again is banned for a while (`GateLimits`)."""
        if peer_id == self.peer_id:  # a computation of our own that failed
            return
        if peer_id in self._violations or len(self._violations) < 10_000:
            self._violations[peer_id] += 1
        self._swarm.note_violation(peer_id)

    async def _close(self) -> None:
        """Say goodbye to all peers at once (upstream: 0.2 s each, one after the other), then stop the rest."""
        with trio.move_on_after(GOODBYE_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer_id in list(self._swarm.get_connections_map()):
                    nursery.start_soon(self._swarm.close_peer, peer_id)
        await self._host.close()
