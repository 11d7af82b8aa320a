"""The places where py-libp2p 0.8.1 is bent, each with its reason. Subclasses only, but for four names."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from libp2p.abc import IMuxedConn, INetConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify import identify
from libp2p.kad_dht import kad_dht, routing_table
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from multiaddr import Multiaddr

from azu.overlay._yamux import CLOSE_SECONDS, AzuYamux
from azu.overlay.faults import reason, shielded
from azu.overlay.gate import Gate, subnet_of
from azu.overlay.held import Held
from azu.overlay.room import Room, origin_of

__all__ = ["AzuHost", "AzuKadDHT", "AzuMuxers", "AzuSwarm", "is_circuit", "quieten_libp2p", "set_agent"]

logger = logging.getLogger(__name__)

QUERY_DIAL_SECONDS = 4.0  # all addresses of one peer together, when the DHT dials it; a look-up may meet many dead ones
MAX_AWAITING_IDENTIFY = 256  # queriers that are not in the routing table yet
UNANSWERED_SECONDS = 30.0  # how long the DHT leaves a peer alone that could not be dialled
MAX_REASON = 200  # characters that are remembered of why
MAX_UNANSWERED = 4096  # such peers that are remembered; then all are forgotten
CIRCUIT_SECONDS = 0.5  # how much earlier direct addresses are tried than relayed ones
ADD_SECONDS = 5.0  # until a connection's tasks run; it waits for nobody else
MAX_DIAL_ADDRESSES = 16  # addresses of one peer that are tried; a hostile record may list thousands


class AzuMuxers(MuxerMultistream):
    """Upstream's new_conn() names its Yamux class in the code, whatever class was registered."""

    def __init__(self) -> None:
        super().__init__({TProtocol(YAMUX): AzuYamux})
        self.held = Held()
        self.on_violation: Callable[[str], None] = lambda peer_id: None  # set by the owner

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Negotiate and start our Yamux."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = AzuYamux(conn, peer_id, conn.is_initiator, held=self.held, on_violation=self.on_violation)
        return self._annotate_connection(muxed, conn, protocol)


class AzuSwarm(Swarm):
    """Dialling and accepting, bent.

    Upstream's dial_peer() tries one address per transport, drops loopback ones, waits 250 ms after each success
    (trap 7), and refuses a peer for 60 s after a failure. Here: all addresses at once, first wins. Upstream keeps a
    task and a slot of the inbound limit for each connection ever accepted, until the swarm stops: a node that runs
    for long would turn everybody away.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: dict[ID, tuple[float, str]] = {}  # until when the DHT does not dial them again, and why
        self.dial_circuit: Callable[[Multiaddr, ID], Awaitable[INetConn]] | None = None  # by a relay; set by the owner
        self.circuit_left: Callable[[INetConn], float] = lambda connection: 1.0  # of its relay's limits; the same
        self.gate = Gate(trio.current_time)
        self.connection_added = trio.Event()  # another one from then on
        self.room = Room(trio.current_time, self.get_connections)
        self.punching: dict[tuple[str, int], ID] = {}  # endpoint -> whom we punch a hole to there, as client

    async def _do_handle_inbound_connection(self, read_write_closer: Any, maddr: Multiaddr, failure_event: Any) -> None:
        try:
            remote = read_write_closer.get_remote_address()
            ticket = self.gate.admit(remote[0]) if remote is not None else None
            if ticket is not None and self.room.is_left(subnet_of(remote[0])):
                with ticket:
                    muxed = await self._upgrade_accepted(read_write_closer, remote, maddr)
                    ticket.established()
                    await muxed.event_closed.wait()
        except Exception as error:  # strangers send what they like to an open port
            logger.debug("inbound connection: %s", reason(error))
        finally:
            with shielded(CLOSE_SECONDS):
                await read_write_closer.close()

    async def _upgrade_accepted(self, stream: Any, remote: tuple[str, int], maddr: Multiaddr) -> Any:
        expected = self.punching.get((remote[0], remote[1]))
        if expected is None:
            return await self.upgrade_inbound_raw_conn(RawConnection(stream, False), maddr)
        # Its SYN was here before ours had left: DCUtR's roles hold all the same, or both ends would wait to be greeted.
        connection: Any = await self.upgrade_outbound_raw_conn(RawConnection(stream, True), expected)
        return connection.muxed_conn

    async def dial_peer(self, peer_id: ID, seconds: float | None = None) -> list[INetConn]:
        """Connect to a peer whose addresses the peerstore knows; joins a dial that is under way.

        Without `seconds` it is a look-up of the DHT that dials: it is patient for QUERY_DIAL_SECONDS, and not at all
        with a peer that did not answer a moment ago, or one that hangs would hold up every look-up that meets it.
        """
        self._refuse_banned(peer_id)
        while True:
            live = [each for each in self.get_connections(peer_id) if not each.is_closed]
            if live:
                return live
            under_way = self._ongoing_dials.get(peer_id)
            if under_way is None:
                break
            await under_way.wait()
        until, why = self._unanswered.get(peer_id, (0.0, ""))
        if seconds is None and trio.current_time() < until:
            raise SwarmException(f"{why} (a moment ago)")
        return [await self._dial_known(peer_id, QUERY_DIAL_SECONDS if seconds is None else seconds)]

    async def _dial_known(self, peer_id: ID, seconds: float) -> INetConn:
        done = self._ongoing_dials[peer_id] = trio.Event()
        try:
            connection = await self._dial_any(peer_id, self.known_addresses(peer_id), seconds)
        except SwarmException as error:
            self._note_unanswered(peer_id, reason(error))
            raise
        else:
            self._unanswered.pop(peer_id, None)
            return connection
        finally:
            del self._ongoing_dials[peer_id]
            done.set()

    async def refresh(self, peer_id: ID, seconds: float) -> None:
        """Where a peer is connected through relays only, and half of what they give is used up, try for more.

        New streams take the connection that has the most left, so that they need not end with the relay's patience.
        """
        live = [each for each in self.get_connections(peer_id) if not each.is_closed]
        if any(each.get_connection_type() == ConnectionType.DIRECT or self.circuit_left(each) > 0.5 for each in live):
            return
        if (under_way := self._ongoing_dials.get(peer_id)) is not None:
            await under_way.wait()
        elif trio.current_time() >= self._unanswered.get(peer_id, (0.0, ""))[0]:
            try:
                await self._dial_known(peer_id, seconds)
            except SwarmException as error:  # what there is still works
                logger.debug("no fresh connection to %s: %s", peer_id, error)

    def _note_unanswered(self, peer_id: ID, why: str) -> None:
        if len(self._unanswered) >= MAX_UNANSWERED:
            self._unanswered.clear()
        self._unanswered[peer_id] = trio.current_time() + UNANSWERED_SECONDS, why[:MAX_REASON]

    def known_addresses(self, peer_id: ID) -> list[Multiaddr]:
        """Addresses in the peerstore that we could dial; none where nothing is known, or all has expired."""
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            return []
        return [each for each in known if self._can_dial(each)]

    def _can_dial(self, address: Multiaddr) -> bool:
        if is_circuit(address):
            return self.dial_circuit is not None
        return self.transport_manager.transport_for_dialing(address) is not None

    def _select_connection(self, connections: list[INetConn], peer_id: ID) -> INetConn:
        """A direct one where there is one: streams must not stay with the relay; else whose relay gives the longest."""
        direct = [each for each in connections if each.get_connection_type() == ConnectionType.DIRECT]
        return super()._select_connection(direct, peer_id) if direct else max(connections, key=self.circuit_left)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> Any:
        """As upstream, which closes a live connection where the dial is cancelled while others are told of it."""
        with shielded(ADD_SECONDS):
            try:
                self._refuse_banned(muxed_conn.peer_id)
                self._make_room(muxed_conn, direction)
            except SwarmException:
                await muxed_conn.close()
                raise
            with self.room.taken(muxed_conn):
                return await super().add_conn(muxed_conn, direction)
        raise SwarmException(f"the connection to {muxed_conn.peer_id} did not start")

    async def notify_connected(self, conn: INetConn) -> None:
        """As upstream, and wakes those who wait for a connection."""
        self.connection_added.set()
        self.connection_added = trio.Event()
        await super().notify_connected(conn)

    def _make_room(self, newcomer: Any, direction: str) -> None:
        """Raise SwarmException if all places are taken, and nobody's is to be had."""
        origin = origin_of(newcomer) if direction == "inbound" else None
        if not self.room.is_left(origin):
            raise SwarmException("as many connections as may be")
        victim = self.room.make(origin)
        if victim is not None:
            logger.debug("idle connection to %s closed for one to %s", victim.peer_id, newcomer.peer_id)
            self.manager.run_task(victim.secured_conn.close)  # the frame loop sees it and cleans up

    def _refuse_banned(self, peer_id: ID) -> None:
        if (left := self.gate.ban_left(str(peer_id))) > 0:
            raise SwarmException(f"{peer_id} broke a protocol again and again, and is banned for {left:.0f} s more")

    def note_violation(self, peer_id: str) -> None:
        """Count it towards a ban; one that is banned now loses its connections."""
        if self.gate.violated(peer_id):
            logger.warning("%s is banned for %.0f s: it breaks protocols", peer_id, self.gate.ban_left(peer_id))
            self.manager.run_task(self.close_peer, ID.from_string(peer_id))

    async def close_peer(self, peer_id: ID) -> None:
        """As upstream, which then forgets whatever connection has come meanwhile, and leaves it open."""
        for connection in self.get_connections(peer_id):
            try:
                await connection.close()
            except Exception as error:  # the others are to be closed all the same
                logger.debug("connection to %s not closed: %s", peer_id, reason(error))

    def protocols_of(self, peer_id: ID) -> Sequence[str]:
        """What a peer speaks; empty until it has told."""
        try:
            return self.peerstore.get_protocols(peer_id) or ()
        except PeerStoreError:
            return ()

    def location_of(self, peer_id: ID) -> Multiaddr | None:
        """Where a peer's direct connection ends; None where there is none."""
        for each in self.get_connections(peer_id):
            muxed: Any = each.muxed_conn
            endpoint = None if each.is_closed else muxed.get_remote_address()
            if endpoint is not None:
                return Multiaddr(f"/ip{6 if ':' in endpoint[0] else 4}/{endpoint[0]}/tcp/{endpoint[1]}")
        return None

    async def _dial_any(self, peer_id: ID, addresses: Sequence[Multiaddr], seconds: float) -> INetConn:
        """Dial the addresses in parallel; the first that proves to be `peer_id` wins, the others are cancelled."""
        won: list[INetConn] = []
        failed: list[Exception] = []
        head_start = 0.0 if all(map(is_circuit, addresses)) else CIRCUIT_SECONDS

        async def attempt(address: Multiaddr) -> None:
            try:
                if self.dial_circuit is not None and is_circuit(address):
                    await trio.sleep(head_start)
                    connection = await self.dial_circuit(address, peer_id)
                else:
                    connection = await self._dial_addr_single_attempt(address, peer_id)
            except Exception as error:  # reported if no other address works
                failed.append(error)
                return
            won.append(connection)
            nursery.cancel_scope.cancel()

        with trio.move_on_after(seconds) as scope:
            async with trio.open_nursery() as nursery:
                for address in addresses[:MAX_DIAL_ADDRESSES]:
                    nursery.start_soon(attempt, address)
        if won:
            return won[0]
        why = f"no answer within {seconds:g} s" if scope.cancelled_caught else "no address is known"
        raise SwarmException(f"cannot dial {peer_id}: {why}") from (failed[0] if failed else None)


class AzuHost(BasicHost):
    """Upstream cuts an address through a relay down to the relay's own."""

    _addrs_factory: Callable[[Sequence[Multiaddr]], list[Multiaddr]]

    def get_addrs(self) -> list[Multiaddr]:
        """What others are told, each with our /p2p part."""
        own = Multiaddr(f"/p2p/{self.get_id()}")
        return [each.encapsulate(own) for each in self._addrs_factory(list(self.get_transport_addrs()))]


class AzuKadDHT(KadDHT):
    """Upstream takes whoever queries for a server and enters it into the routing table, client-mode nodes behind a
    NAT included; look-ups then wait for them. Here an inbound querier is entered once identify has told that it
    serves.

    And upstream's diversity of a bucket goes by the address that a peer claims, so that who claims none counts for
    none. Here it goes by the address that the peer is connected from. Only peers from private networks are exempt,
    which can connect only where we are in one.
    """

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Enter a peer; one that queries us (`skip_server_mode_check`) a little later."""
        if not skip_server_mode_check:
            return await self._enter(peer_id)
        pending: set[ID] = self.__dict__.setdefault("_awaiting_identify", set())
        if peer_id not in pending and len(pending) < MAX_AWAITING_IDENTIFY:
            pending.add(peer_id)
            self.manager.run_task(self._add_once_identified, peer_id, pending)
        return False

    async def _enter(self, peer_id: ID) -> bool:
        swarm: Any = self.host.get_network()
        location = swarm.location_of(peer_id)
        if location is None:  # it is reached through a relay, and can be anywhere
            return False
        return await self.routing_table.add_peer(PeerInfo(peer_id, [location, *swarm.known_addresses(peer_id)]))

    async def _add_once_identified(self, peer_id: ID, pending: set[ID]) -> None:
        swarm: Any = self.host.get_network()
        try:
            for _ in range(250):
                protocols = swarm.protocols_of(peer_id)
                if PROTOCOL_ID in protocols:
                    await self._enter(peer_id)
                if protocols:
                    return
                await trio.sleep(0.02)
        finally:
            pending.discard(peer_id)


class _AnyKey:
    """Stands in for the module `multihash` in upstream's DHT server, which resets a stream that asks for the peers
    closest to a key of more than 50 bytes unless this decodes it. Records have keys of 64 bytes and more, and every
    look-up for a place to put one asks so. The server only hashes the key, whatever it is.
    """

    @staticmethod
    def decode(key: bytes) -> None:
        """Raises ValueError where no record can have such a key (go-libp2p has the same bound)."""
        if len(key) > 128:
            raise ValueError("too long for a key")


_upstream: Any = routing_table
_upstream.SUBNET_PREFIX_LEN_V4, _upstream.SUBNET_PREFIX_LEN_V6 = 16, 32  # what one owner can easily have
kad_dht.multihash = _AnyKey  # type: ignore[attr-defined]  # an import of upstream, looked up by name


def is_circuit(address: Multiaddr) -> bool:
    """Whether an address leads through a relay."""
    return "/p2p-circuit" in str(address)


def set_agent(agent: str) -> None:
    """Upstream's identify handler reads its agent from a module constant and offers no argument for it."""
    identify.AGENT_VERSION = agent


def quieten_libp2p() -> None:
    """Give libp2p's loggers a level of their own (trap 12): CRITICAL, or what AZU_LIBP2P_LOG names.

    Its errors are mostly remote faults that azu reports itself. SwarmConn logs to the root logger, but at
    debug level, or as warnings that come with a fault that azu sees too.
    """
    level = logging.getLevelName(os.environ.get("AZU_LIBP2P_LOG", "CRITICAL").upper())
    if not isinstance(level, int):
        level = logging.CRITICAL
    parent = logging.getLogger("libp2p")
    parent.setLevel(level)
    parent.propagate = True  # its setup_logging() switches that off
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
