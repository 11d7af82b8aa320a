"""The relay's client: reservations, and connections that go and come through a relay (circuit relay v2).

A circuit is a stream to the relay that the two ends use as if it were a socket: Noise and Yamux run through it from end
to end, so that a relayed connection is authenticated, encrypted and used like any other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as Codes
from multiaddr import Multiaddr

from azu.errors import NetworkError, ProtocolError
from azu.overlay._patches import AzuSwarm
from azu.overlay.addresses import parse_circuit, parse_peer_id
from azu.overlay.faults import mapped
from azu.overlay.nat.messages import decode_addresses, read_message, write_message
from azu.overlay.nat.punch import Puncher
from azu.overlay.nat.relay import HOP
from azu.overlay.streams import OverlayStream

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["Circuits", "Reservation"]

_ANSWER_SECONDS = 10.0  # a relay's, which may have to wait for the other peer
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
        self.relays: set[str] = set()  # whom we let pass connections on to us

    async def reserve(self, relay: str) -> Reservation:
        """Ask a connected peer to pass connections on to us, or to go on with it.

        Raises:
            NetworkError: it does not relay, refuses, or does not answer. ProtocolError: its answer is malformed.
        """
        with trio.fail_after(_ANSWER_SECONDS):
            async with await self._overlay.open_stream(relay, HOP) as stream:
                if stream.is_relayed:
                    raise NetworkError(f"{relay} is itself reached through a relay")
                await write_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = _accepted(relay, await read_message(stream, HopMessage))
        given = decode_addresses(answer.reservation.addrs)
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
        await self._overlay.connect(relay, [relay_address])
        stream = await self._overlay.open_stream(relay, HOP)
        try:
            if stream.is_relayed:
                raise NetworkError(f"{relay} is itself reached through a relay")
            with trio.fail_after(_ANSWER_SECONDS):
                request = HopMessage(type=HopMessage.CONNECT)
                request.peer.id = target.to_bytes()
                await write_message(stream, request)
                _accepted(relay, await read_message(stream, HopMessage))
            self._puncher.expect(str(target))
            return await self._swarm.upgrade_outbound_raw_conn(_raw(stream, address, is_initiator=True), target)
        except BaseException:
            await stream.reset()
            raise

    async def handle_stop(self, stream: OverlayStream) -> None:
        """Accept a connection that a relay passes on; it lasts as long as this does."""
        with trio.fail_after(_ANSWER_SECONDS):
            offer = await read_message(stream, StopMessage)
        if offer.type != StopMessage.CONNECT or stream.peer_id not in self.relays or stream.is_relayed:
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.PERMISSION_DENIED))
            return
        source = _peer_of(offer)
        await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Codes.OK))
        # In full, since identify tells it to the other end, and js-libp2p takes none that begins with /p2p.
        relay_address = self._overlay.remote_address(stream.peer_id)
        address = Multiaddr(f"{relay_address}/p2p/{stream.peer_id}/p2p-circuit")
        with mapped(f"accept a connection through {stream.peer_id}"):
            muxed: Any = await self._swarm.upgrade_inbound_raw_conn(_raw(stream, address, is_initiator=False), address)
        if str(muxed.peer_id) != source:
            await muxed.close()
            raise ProtocolError(f"{stream.peer_id} passed on another peer than it named", code="bad_message")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._puncher.begin, source)
            await muxed.event_closed.wait()
            nursery.cancel_scope.cancel()


class _CircuitIO(ReadWriteCloser):
    """A stream to a relay in the place of a socket."""

    def __init__(self, stream: OverlayStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        data = await self._stream.receive_some(65_536 if n is None else n)
        if not data and n != 0:
            raise ConnectionClosedError("the circuit ended", transport="circuit")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except NetworkError as error:
            raise ConnectionClosedError(f"the circuit ended: {error}", transport="circuit") from error

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None  # the relay's would be taken for the peer's


def _raw(stream: OverlayStream, address: Multiaddr, *, is_initiator: bool) -> RawConnection:
    return RawConnection(_CircuitIO(stream), is_initiator, ConnectionType.RELAYED, [address])


def _accepted(relay: str, answer: HopMessage) -> HopMessage:
    if answer.type == HopMessage.STATUS and answer.status == Codes.OK:
        return answer
    try:
        why = Codes.Name(answer.status).lower().replace("_", " ")
    except ValueError:
        why = f"status {answer.status}"
    raise NetworkError(f"the relay {relay} says: {why}", code="relay_refused")


def _peer_of(offer: StopMessage) -> str:
    try:
        return str(parse_peer_id(str(ID(offer.peer.id))))
    except Exception as error:
        raise ProtocolError("a circuit from no peer id", code="bad_message") from error
