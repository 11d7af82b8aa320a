"""The relay's client: reservations, and connections that go and come through a relay (circuit relay v2).

A circuit is a stream to the relay that the two ends use as if it were a socket: Noise and Yamux run through it from end
to end, so that a relayed connection is authenticated, encrypted and used like any other.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as Codes
from multiaddr import Multiaddr

from azu.errors import NetworkError, ProtocolError
from azu.overlay._patches import AzuSwarm
from azu.overlay.addresses import parse_circuit
from azu.overlay.faults import mapped
from azu.overlay.nat.messages import decode_addresses, decode_peer, read_message, write_message
from azu.overlay.nat.punch import Puncher
from azu.overlay.nat.relay import HOP
from azu.overlay.streams import OverlayStream

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["Circuits", "Reservation"]

_ANSWER_SECONDS = 10.0  # a relay's, which may have to wait for the other peer
_MAX_RELAY_ADDRESSES = 4  # that we tell others of one relay
_IDLE_SECONDS = 5.0  # without a stream beside a direct connection, after which a relayed one is closed
_LEAST_RESERVATION, _LONGEST_RESERVATION = 60.0, 86_400.0  # seconds; what a relay may tell us


@dataclass(frozen=True, slots=True)
class Reservation:
    """A relay's promise to pass connections on to us.

    addresses: multiaddrs through it, that end in /p2p-circuit. seconds: for how long from now.
    """

    relay: str
    addresses: tuple[str, ...]
    seconds: float


class Circuits:
    """This node's circuits; `puncher` turns them into direct connections."""

    def __init__(self, overlay: Overlay, swarm: AzuSwarm, puncher: Puncher) -> None:
        self._overlay = overlay
        self._swarm = swarm
        self._puncher = puncher
        self._ends: WeakKeyDictionary[Any, _CircuitIO] = WeakKeyDictionary()  # by the muxer on it
        self.relays: set[str] = set()  # whom we let pass connections on to us

    async def reserve(self, relay: str) -> Reservation:
        """Ask a connected peer to pass connections on to us, or to go on with it.

        Raises:
            NetworkError: it does not relay, refuses, does not answer, or has no address that others could dial.
            ProtocolError: its answer is malformed.
        """
        with mapped(f"reserve a place at {relay}"), trio.fail_after(_ANSWER_SECONDS):
            async with await self._overlay.open_stream(relay, HOP) as stream:
                if stream.is_relayed:
                    raise NetworkError(f"{relay} is itself reached through a relay")
                await write_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = _accepted(relay, await read_message(stream, HopMessage))
        given = decode_addresses(answer.reservation.addrs)[:_MAX_RELAY_ADDRESSES]
        if not given:
            raise NetworkError(f"the relay {relay} tells no address at which others can dial it")
        addresses = tuple(f"{address}/p2p/{relay}/p2p-circuit" for address in given)
        seconds = min(max(answer.reservation.expire - time.time(), _LEAST_RESERVATION), _LONGEST_RESERVATION)
        self.relays.add(relay)
        return Reservation(relay, addresses, seconds)

    async def dial(self, address: Multiaddr, target: ID) -> Any:
        """A swarm connection to a peer through the relay that the address names.

        Raises:
            NetworkError: the relay or the peer cannot be reached. libp2p's errors where the peer is another one.
        """
        relay, relay_address = parse_circuit(str(address))
        if relay == str(target):
            raise NetworkError(f"{relay} cannot be its own relay")
        await self._overlay.connect(relay, [relay_address])
        stream = await self._overlay.open_stream(relay, HOP)
        try:
            if stream.is_relayed:
                raise NetworkError(f"{relay} is itself reached through a relay")
            with mapped(f"reach {target} through {relay}"), trio.fail_after(_ANSWER_SECONDS):
                request = HopMessage(type=HopMessage.CONNECT)
                request.peer.id = target.to_bytes()
                await write_message(stream, request)
                answer = _accepted(relay, await read_message(stream, HopMessage))
            self._puncher.expect(str(target))
            end = _CircuitIO(stream, answer.limit)
            raw = RawConnection(end, True, ConnectionType.RELAYED, [address])
            connection = await self._swarm.upgrade_outbound_raw_conn(raw, target)
            self._ends[connection.muxed_conn] = end
            return connection
        except BaseException:
            await stream.reset()
            raise

    async def handle_stop(self, stream: OverlayStream) -> None:
        """Accept a connection that a relay passes on; it lasts as long as this does."""
        with mapped(f"read what {stream.peer_id} passes on"), trio.fail_after(_ANSWER_SECONDS):
            offer = await read_message(stream, StopMessage)
        if offer.type != StopMessage.CONNECT or stream.peer_id not in self.relays or stream.is_relayed:
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.PERMISSION_DENIED))
            return
        source = decode_peer(offer.peer.id)
        await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.OK))
        # In full, since identify tells it to the other end, and js-libp2p takes none that begins with /p2p.
        relay_address = self._overlay.remote_address(stream.peer_id)
        address = Multiaddr(f"{relay_address}/p2p/{stream.peer_id}/p2p-circuit")
        end = _CircuitIO(stream, offer.limit)
        with mapped(f"accept a connection through {stream.peer_id}"):
            raw = RawConnection(end, False, ConnectionType.RELAYED, [address])
            muxed: Any = await self._swarm.upgrade_inbound_raw_conn(raw, address)
        self._ends[muxed] = end
        if str(muxed.peer_id) != source:
            await muxed.close()
            raise ProtocolError(f"{stream.peer_id} passed on another peer than it named", code="bad_message")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._puncher.begin, source)
            await self._while_needed(muxed, source)
            nursery.cancel_scope.cancel()
        await muxed.close()

    async def _while_needed(self, muxed: Any, peer_id: str) -> None:
        """Wait until a connection has ended, or has had no streams for a while beside a direct one.

        Streams that run on it go on, since new ones are direct; and those are no surprise to the other end, which knows
        of the direct connection by then.
        """
        was_idle = False
        while not muxed.event_closed.is_set():
            is_idle = not muxed.streams and self._overlay.is_direct(peer_id)
            if is_idle and was_idle:
                return
            was_idle = is_idle
            with trio.move_on_after(_IDLE_SECONDS):
                await muxed.event_closed.wait()

    def left(self, connection: Any) -> float:
        """How much of what its relay gives a connection has not used up yet, from 1 to 0."""
        end = self._ends.get(connection.muxed_conn)
        return 1.0 if end is None else end.left()


class _CircuitIO(ReadWriteCloser):
    """A stream to a relay in the place of a socket. limit: the relay's, where nothing or zero means none."""

    def __init__(self, stream: OverlayStream, limit: Limit) -> None:
        self._stream = stream
        self._seconds, self._bytes = limit.duration or math.inf, limit.data or math.inf
        self._begun = trio.current_time()
        self._received = self._sent = 0

    def left(self) -> float:
        """The share of time and bytes that is not used up: of the one that ends first."""
        age = trio.current_time() - self._begun
        return 1.0 - max(age / self._seconds, self._received / self._bytes, self._sent / self._bytes)

    async def read(self, n: int | None = None) -> bytes:
        data = await self._stream.receive_some(65_536 if n is None else n)
        if not data and n != 0:
            raise ConnectionClosedError("the circuit ended", transport="circuit")
        self._received += len(data)
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except NetworkError as error:
            raise ConnectionClosedError(f"the circuit ended: {error}", transport="circuit") from error
        self._sent += len(data)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None  # the relay's would be taken for the peer's


def _accepted(relay: str, answer: HopMessage) -> HopMessage:
    if answer.type == HopMessage.STATUS and answer.status == Codes.OK:
        return answer
    try:
        why = Codes.Name(answer.status).lower().replace("_", " ")
    except ValueError:
        why = f"status {answer.status}"
    raise NetworkError(f"the relay {relay} says: {why}", code="relay_refused")
