"""Build the libp2p host, own its tasks, and connect peers."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from azu.errors import InputError, InternalError, NetworkError
from azu.overlay._patches import AzuMuxers, AzuSwarm, BufferedTCP, quieten_libp2p, set_agent
from azu.overlay._yamux import AzuYamux
from azu.overlay.addresses import (
    expand_addresses,
    parse_dial_address,
    parse_listen_address,
    parse_peer_id,
    parse_peer_multiaddr,
)
from azu.overlay.dht import Dht, RecordValidator
from azu.overlay.faults import mapped, reason, settle, shielded
from azu.overlay.inbound import Inbound
from azu.overlay.negotiate import negotiate
from azu.overlay.streams import OverlayStream

__all__ = ["Overlay", "OverlayConfig", "OverlayStatistics", "open_overlay"]

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
GOODBYE_SECONDS = 2.0  # all connections together, when the overlay is left
MAX_CONNECTIONS = 1024
# Two: where both sides dial at once, each may see the other's connection first, and trimming to one could end both.
MAX_CONNECTIONS_PER_PEER = 2
ADDRESS_SECONDS = 3600  # how long a dialled address is remembered
BOOTSTRAP_SECONDS = 7 * 24 * 3600  # the same for a bootstrap node's, which the operator vouches for
PING = "/ipfs/ping/1.0.0"

Handler = Callable[[OverlayStream], Awaitable[None]]


@dataclass(frozen=True)
class OverlayConfig:
    """What an overlay is opened with.

    seed: 32-byte Ed25519 seed = the identity. listen: multiaddrs; port 0 takes a free one, () listens nowhere.
    server: whether this node answers DHT queries. agent: what identify tells other peers.
    validators: DHT namespace -> validator; all other namespaces are refused.
    """

    seed: bytes
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    server: bool = True
    agent: str = "azu/0.1.0"
    validators: Mapping[str, RecordValidator] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        return f"OverlayConfig(listen={self.listen}, server={self.server}, agent={self.agent!r})"  # never the seed


@dataclass(frozen=True)
class OverlayStatistics:
    """A snapshot. connections: live ones; streams: open ones in both directions; violations: per peer id."""

    connections: int
    streams: int
    routing_table: int
    violations: Mapping[str, int]


@asynccontextmanager
async def open_overlay(config: OverlayConfig) -> AsyncIterator[Overlay]:
    """Start host and DHT, and end them with all their tasks, connections and listeners on the way out.

    Safe to cancel; leaving takes about 2 s at most.

    Raises:
        InputError: a bad seed or listen address. NetworkError: a listen address is taken.
        InternalError: the host itself failed while the overlay was open.
    """
    quieten_libp2p()
    listen = [parse_listen_address(each) for each in config.listen]
    swarm, host = _build(config)
    overlay = Overlay(host, swarm, Dht(host, server=config.server, validators=config.validators))
    from_body: Exception | None = None
    try:
        async with background_trio_service(swarm):
            try:
                with mapped(f"listen on {', '.join(config.listen)}", "Choose another port or address"):
                    _refuse_taken(listen)
                    if listen and not await swarm.listen(*listen):
                        raise OSError("the address is not this machine's, or the port needs privileges")
                async with background_trio_service(overlay._dht.service):
                    try:
                        yield overlay
                    except Exception as error:  # carried past the nurseries, which would wrap it in groups
                        from_body = error
                    except BaseExceptionGroup as group:  # errors together with a cancellation
                        from_body, rest = group.split(Exception)
                        if rest is not None:
                            raise rest from None
            finally:
                with trio.CancelScope(shield=True):
                    await overlay._close()
    except BaseExceptionGroup as group:
        cause = settle(group)
        if isinstance(cause, (NetworkError, InputError)):
            raise cause from None
        if isinstance(cause, Exception) and from_body is None:
            raise InternalError(f"the libp2p host failed: {reason(cause)}", code="overlay_failed") from cause
        if from_body is None:
            raise
    if from_body is not None:
        raise from_body


def _refuse_taken(listen: Sequence[Multiaddr]) -> None:
    """Raise OSError if a port is in use. libp2p listens with SO_REUSEPORT: a second node on the port would start
    without complaint, and the kernel would hand each of them half of the other's peers.
    """
    for address in listen:
        (family, host), (_, port) = [(protocol.name, str(value)) for protocol, value in address.items()]
        with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))


def _build(config: OverlayConfig) -> tuple[AzuSwarm, BasicHost]:
    """The host by hand: new_host() allows plaintext (trap 11), dials strangers to stay above 100 connections, and
    its resource manager turns peers away once this process uses much memory, as one with a model in it does.
    """
    if len(config.seed) != 32:
        raise InputError(f"an identity seed has 32 bytes, not {len(config.seed)}", code="bad_seed")
    keys = create_new_key_pair(bytes(config.seed))
    set_agent(config.agent)
    noise = NoiseTransport(libp2p_keypair=keys, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader({TProtocol(NOISE): noise}, {})
    upgrader.muxer_multistream = AzuMuxers({TProtocol(YAMUX): AzuYamux})
    peer_id = ID.from_pubkey(keys.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, keys)
    limits = ConnectionConfig(
        min_connections=0,
        low_watermark=0,
        high_watermark=MAX_CONNECTIONS,
        max_connections=MAX_CONNECTIONS,
        max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
    )
    swarm = AzuSwarm(peer_id, peerstore, upgrader, [BufferedTCP()], RetryConfig(max_retries=0), limits)
    host = BasicHost(
        swarm,
        addrs_factory=expand_addresses,
        disable_identify_address_discovery=True,
    )
    return swarm, host


class Overlay:
    """This node in the network. Made by `open_overlay`, valid inside its `async with`."""

    def __init__(self, host: BasicHost, swarm: AzuSwarm, dht: Dht) -> None:
        self.peer_id = str(host.get_id())
        self._host = host
        self._swarm = swarm
        self._dht = dht
        self._violations: Counter[str] = Counter()
        self._inbound = Inbound(host, self.count_violation)

    @property
    def addrs(self) -> tuple[str, ...]:
        """Dialable multiaddrs with /p2p/<peer id>; wildcards expanded, loopback last."""
        return tuple(str(each) for each in self._host.get_addrs())

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
            return
        if peer_id == self.peer_id:
            raise InputError("a node cannot connect to itself", code="bad_peer_id")
        with mapped(f"reach {peer_id}", "The peer may be down, or behind a NAT or firewall"):
            with trio.fail_after(CONNECT_SECONDS):
                await self._dial(target, given)

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

    async def providers(self, key: bytes, *, timeout: float = 10.0) -> tuple[str, ...]:
        """Peer ids other than ours that announced this 32-byte digest; they may be gone (48 h memory)."""
        return await self._dht.providers(key, timeout)

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

    def statistics(self) -> OverlayStatistics:
        """A snapshot of connections, streams, routing table and violations."""
        live = [each for all_of in self._swarm.get_connections_map().values() for each in all_of if not each.is_closed]
        return OverlayStatistics(
            connections=len(live),
            streams=sum(len(each.get_streams()) for each in live),
            routing_table=self._dht.table_size(),
            violations=MappingProxyType(dict(self._violations)),
        )

    def count_violation(self, peer_id: str) -> None:
        """Note that a peer broke a protocol; the count is in `statistics()`."""
        if peer_id in self._violations or len(self._violations) < 10_000:
            self._violations[peer_id] += 1

    async def _close(self) -> None:
        """Say goodbye to all peers at once (upstream: 0.2 s each, one after the other), then stop the rest."""
        with trio.move_on_after(GOODBYE_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer_id in list(self._swarm.get_connections_map()):
                    nursery.start_soon(self._swarm.close_peer, peer_id)
        await self._host.close()
