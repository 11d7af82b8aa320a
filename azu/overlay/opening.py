"""Build the libp2p host out of our parts, and own its tasks."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

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
from libp2p.tools.anyio_service import Service, background_trio_service
from multiaddr import Multiaddr

from azu.errors import InputError, InternalError, NetworkError
from azu.overlay._patches import AzuHost, AzuMuxers, AzuSwarm, quieten_libp2p, set_agent
from azu.overlay._tcp import BufferedTCP
from azu.overlay.addresses import (
    OwnAddresses,
    parse_announced,
    parse_listen_address,
)
from azu.overlay.dht import Dht, RecordValidator
from azu.overlay.faults import mapped, reason, settle
from azu.overlay.gate import GateLimits
from azu.overlay.host import Overlay
from azu.overlay.nat.relay import RelayLimits
from azu.overlay.nat.traversal import Traversal
from azu.overlay.swarm_key import KeyedUpgrader

__all__ = ["OverlayConfig", "open_overlay"]

MAX_CONNECTIONS = 1024
# Beyond those, of accepted ones: the gate lets twice its 256 begin a handshake, and a place may be made for each.
UNFINISHED = 2 * GateLimits().unfinished
# Not one: where both sides dial at once, each may see the other's connection first, and trimming to one could end both.
# And a third through a relay.
MAX_CONNECTIONS_PER_PEER = 3


@dataclass(frozen=True)
class OverlayConfig:
    """What an overlay is opened with.

    seed: 32-byte Ed25519 seed = the identity. listen: multiaddrs; port 0 takes a free one, () listens nowhere.
    server: whether this node answers DHT queries. agent: what identify tells other peers.
    validators: DHT namespace -> validator; all other namespaces are refused. relay: what this node relays for others.
    swarm_key: 32 bytes that all members of a private swarm have; only they can connect. port_mapping: whether the
    router may be asked to lead a port of its own here.
    """

    seed: bytes
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    server: bool = True
    agent: str = "azu/0.1.0"
    validators: Mapping[str, RecordValidator] = field(default_factory=lambda: MappingProxyType({}))
    relay: RelayLimits | None = None
    announce: tuple[str, ...] = ()
    swarm_key: bytes | None = None
    port_mapping: bool = True

    def __repr__(self) -> str:
        return f"OverlayConfig(listen={self.listen}, server={self.server}, agent={self.agent!r})"  # never the seed


@asynccontextmanager
async def open_overlay(config: OverlayConfig) -> AsyncIterator[Overlay]:
    """Start host and DHT, and end them with all their tasks, connections and listeners on the way out.

    Safe to cancel: it works until the body has ended. Leaving then takes about 2 s at most.

    Raises:
        InputError: a bad seed or listen address. NetworkError: a listen address is taken.
        InternalError: the host itself failed while the overlay was open.
    """
    quieten_libp2p()
    listen = [parse_listen_address(each) for each in config.listen]
    tcp, addresses = BufferedTCP(), OwnAddresses([str(parse_announced(each)) for each in config.announce])
    muxers = AzuMuxers()
    swarm, host = _build(config, tcp, addresses, muxers)
    overlay = Overlay(host, swarm, Dht(host, server=config.server, validators=config.validators))
    overlay._traversal = traversal = Traversal(overlay, swarm, tcp, config.relay, port_mapping=config.port_mapping)
    muxers.on_violation = overlay.count_violation
    swarm.room.is_kept = overlay._keeps
    addresses.found = lambda: traversal.addresses
    from_body: Exception | None = None
    try:
        async with _running(swarm):
            try:
                with mapped(f"listen on {', '.join(config.listen)}", "Choose another port or address"):
                    _refuse_taken(listen)
                    if listen and not await swarm.listen(*listen):
                        raise OSError("the address is not this machine's, or the port needs privileges")
                async with _running(overlay._dht.service), trio.open_nursery() as nursery:
                    nursery.start_soon(traversal.run)
                    try:
                        yield overlay
                    except Exception as error:  # carried past the nurseries, which would wrap it in groups
                        from_body = error
                    except BaseExceptionGroup as group:  # errors together with a cancellation
                        from_body, rest = group.split(Exception)
                        if rest is not None:
                            raise rest from None
                    nursery.cancel_scope.cancel()
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


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    """Keep a service of libp2p's running until the body has ended, also while it ends because it is cancelled: a
    node that leaves still has something to say.
    """
    ended = trio.Event()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope(shield=True):
            async with background_trio_service(service):
                task_status.started()
                await ended.wait()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        try:
            yield
        finally:
            ended.set()


def _refuse_taken(listen: Sequence[Multiaddr]) -> None:
    """Raise OSError if a port is in use. libp2p listens with SO_REUSEPORT: a second node on the port would start
    without complaint, and the kernel would hand each of them half of the other's peers.
    """
    for address in listen:
        (family, host), (_, port) = [(protocol.name, str(value)) for protocol, value in address.items()]
        with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, int(port)))


def _build(
    config: OverlayConfig, tcp: BufferedTCP, addresses: OwnAddresses, muxers: AzuMuxers
) -> tuple[AzuSwarm, BasicHost]:
    """The host by hand: new_host() allows plaintext (trap 11), dials strangers to stay above 100 connections, and
    its resource manager turns peers away once this process uses much memory, as one with a model in it does.
    """
    if len(config.seed) != 32:
        raise InputError(f"an identity seed has 32 bytes, not {len(config.seed)}", code="bad_seed")
    keys = create_new_key_pair(bytes(config.seed))
    set_agent(config.agent)
    noise = NoiseTransport(libp2p_keypair=keys, noise_privkey=create_noise_key_pair().private_key)
    upgrader = KeyedUpgrader({TProtocol(NOISE): noise}, {}, config.swarm_key)
    upgrader.muxer_multistream = muxers
    peer_id = ID.from_pubkey(keys.public_key)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, keys)
    limits = ConnectionConfig(
        min_connections=0,
        low_watermark=0,
        high_watermark=MAX_CONNECTIONS + UNFINISHED,
        max_connections=MAX_CONNECTIONS + UNFINISHED,
        max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
    )
    swarm = AzuSwarm(peer_id, peerstore, upgrader, [tcp], RetryConfig(max_retries=0), limits)
    swarm.room.bound = MAX_CONNECTIONS
    host = AzuHost(
        swarm,
        addrs_factory=addresses,
        disable_identify_address_discovery=True,
    )
    return swarm, host
