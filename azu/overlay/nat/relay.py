"""The relay: circuits between two peers of which one cannot be connected to (circuit relay v2).

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md. A relay sees only Noise: both ends of a circuit
authenticate each other, and encrypt. What it gives is bounded in every direction, so that nobody can make it a proxy:
reservations in all and for each line to the internet, circuits of each peer, and of each circuit its bytes and time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status as Codes

from azu.errors import AzuError, NetworkError
from azu.logs import log
from azu.overlay.addresses import line_of, parse_peer_id
from azu.overlay.faults import mapped
from azu.overlay.nat.dialing import is_public
from azu.overlay.nat.messages import decode_peer, encode_addresses, read_message, write_message
from azu.overlay.streams import OverlayStream

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["HOP", "STOP", "Relay", "RelayLimits", "RelayStatistics"]

logger = logging.getLogger(__name__)

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
_MESSAGE_SECONDS = 10.0  # for one message of a peer
_CHUNK = 262_144


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What one relay gives.

    reservations: in all; per_address: of one IPv4 address or IPv6 /56. circuits: at once, in all; per_peer: that begin
    or end at one peer. data: bytes of one circuit in each direction; duration: seconds of one circuit. reservation:
    seconds for which a reservation holds.
    """

    reservations: int = 256
    per_address: int = 8
    circuits: int = 128
    per_peer: int = 16
    data: int = 1 << 30
    duration: int = 1_800
    reservation: int = 3_600


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    """reservations and circuits: now. carried: bytes of all circuits ever. refused: requests ever."""

    reservations: int
    circuits: int
    carried: int
    refused: int


class _Refusal(Exception):
    """What is answered instead of a circuit."""

    def __init__(self, code: Codes.ValueType, why: str) -> None:
        super().__init__(why)
        self.code = code


@dataclass(slots=True)
class _Reservation:
    line: str
    expires: float


class Relay:
    """Serves HOP with `handle`."""

    def __init__(self, overlay: Overlay, limits: RelayLimits) -> None:
        self._overlay = overlay
        self._limits = limits
        self._reservations: dict[str, _Reservation] = {}
        self._circuits: Counter[str] = Counter()
        self._open = self._carried = self._refused = 0

    def statistics(self) -> RelayStatistics:
        """A snapshot."""
        self._expire()
        return RelayStatistics(len(self._reservations), self._open, self._carried, self._refused)

    def is_reserved(self, peer_id: str) -> bool:
        """Whether a peer has a reservation."""
        held = self._reservations.get(peer_id)
        return held is not None and held.expires >= trio.current_time()

    async def handle(self, stream: OverlayStream) -> None:
        """Answer one request; a circuit lasts as long as this does."""
        with mapped(f"read what {stream.peer_id} asks of the relay"), trio.fail_after(_MESSAGE_SECONDS):
            request = await read_message(stream, HopMessage)
        try:
            if stream.is_relayed or not stream.remote_ip:
                raise _Refusal(Codes.PERMISSION_DENIED, "over a circuit, or gone")
            if request.type == HopMessage.RESERVE:
                await self._reserve(stream)
            elif request.type == HopMessage.CONNECT:
                await self._connect(stream, request)
            else:
                raise _Refusal(Codes.UNEXPECTED_MESSAGE, "unexpected")
        except _Refusal as refusal:
            self._refused += 1
            log(logger, logging.DEBUG, "relaying refused", peer=stream.peer_id, reason=str(refusal))
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=refusal.code))

    async def _reserve(self, stream: OverlayStream) -> None:
        self._expire()
        limits, held, line = self._limits, self._reservations, line_of(stream.remote_ip)
        others = [each for peer_id, each in held.items() if peer_id != stream.peer_id]
        if len(others) >= limits.reservations:
            raise _Refusal(Codes.RESERVATION_REFUSED, "all reservations are taken")
        if sum(each.line == line for each in others) >= limits.per_address:
            raise _Refusal(Codes.RESERVATION_REFUSED, f"{line} has as many as one address may")
        held[stream.peer_id] = _Reservation(line, trio.current_time() + limits.reservation)
        answer = HopMessage(type=HopMessage.STATUS, status=Codes.OK)
        answer.reservation.expire = int(time.time()) + limits.reservation
        answer.reservation.addrs.extend(encode_addresses(self._own_addresses()))
        self._state_limit(answer)
        await write_message(stream, answer)

    def _own_addresses(self) -> list[str]:
        """The public ones, unless there are none, each with our /p2p part, as the specification wants it."""
        own = self._overlay.own_addresses
        chosen = [each for each in own if is_public(each)] or own
        return [f"{each}/p2p/{self._overlay.peer_id}" for each in chosen]

    async def _connect(self, stream: OverlayStream, request: HopMessage) -> None:
        target = decode_peer(request.peer.id)
        with self._circuit(stream.peer_id, target):
            stop = await self._reach(stream.peer_id, target)
            async with stop:
                answer = HopMessage(type=HopMessage.STATUS, status=Codes.OK)
                self._state_limit(answer)
                await write_message(stream, answer)
                await self._carry(stream, stop)

    def _circuit(self, source: str, target: str) -> _Counted:
        self._expire()
        if target not in self._reservations:
            raise _Refusal(Codes.NO_RESERVATION, f"{target} has no reservation here")
        busy = max(self._circuits[source], self._circuits[target])
        if self._open >= self._limits.circuits or busy >= self._limits.per_peer:
            raise _Refusal(Codes.RESOURCE_LIMIT_EXCEEDED, "as many circuits as may be")
        return _Counted(self, source, target)

    async def _reach(self, source: str, target: str) -> OverlayStream:
        """A stream to the target on which it has accepted the circuit."""
        try:
            with trio.fail_after(_MESSAGE_SECONDS):
                stop = await self._overlay.open_stream(target, STOP)
                try:
                    offer = StopMessage(type=StopMessage.CONNECT)
                    offer.peer.id = parse_peer_id(source).to_bytes()
                    offer.limit.duration, offer.limit.data = self._limits.duration, self._limits.data
                    await write_message(stop, offer)
                    answer = await read_message(stop, StopMessage)
                except BaseException:
                    await stop.reset()
                    raise
        except (AzuError, trio.TooSlowError) as error:
            raise _Refusal(Codes.CONNECTION_FAILED, f"{target} does not answer: {error}") from error
        if answer.type != StopMessage.STATUS or answer.status != Codes.OK:
            await stop.reset()
            raise _Refusal(Codes.CONNECTION_FAILED, f"{target} does not want it")
        return stop

    async def _carry(self, one: OverlayStream, other: OverlayStream) -> None:
        """Move bytes both ways until both directions end, or a limit does it."""
        with trio.move_on_after(self._limits.duration) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, one, other, scope)
                nursery.start_soon(self._pump, other, one, scope)
        if scope.cancelled_caught:
            await one.reset()
            await other.reset()

    async def _pump(self, source: OverlayStream, sink: OverlayStream, circuit: trio.CancelScope) -> None:
        left = self._limits.data
        try:
            while buffers := await source.receive_buffers(_CHUNK):
                size = sum(map(len, buffers))
                left -= size
                if left < 0:
                    circuit.cancel()
                    return
                await sink.send_all(*buffers)
                self._carried += size
            await sink.send_eof()
        except NetworkError:  # one end is gone, and with it the circuit
            circuit.cancel()

    def _state_limit(self, answer: HopMessage) -> None:
        answer.limit.duration, answer.limit.data = self._limits.duration, self._limits.data

    def _expire(self) -> None:
        now = trio.current_time()
        gone = [peer for peer, each in self._reservations.items() if each.expires < now]
        gone += [peer for peer in self._reservations if not self._overlay.is_direct(peer)]
        for peer in dict.fromkeys(gone):
            del self._reservations[peer]


class _Counted:
    """One circuit in the relay's counts."""

    def __init__(self, relay: Relay, *peers: str) -> None:
        self._relay, self._peers = relay, peers

    def __enter__(self) -> None:
        self._relay._open += 1
        self._relay._circuits.update(self._peers)

    def __exit__(self, *exc_info: object) -> None:
        self._relay._open -= 1
        self._relay._circuits.subtract(self._peers)
        for peer in self._peers:
            if not self._relay._circuits[peer]:
                del self._relay._circuits[peer]
