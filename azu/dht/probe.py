"""What any libp2p node tells whoever asks: that it is alive (ping), and what it is (identify)."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from azu.dht.snapshot import Pong
from azu.errors import NetworkError, ProtocolError
from azu.overlay import Overlay, OverlayStream

__all__ = ["Identified", "identify", "parse_identified", "ping"]

_PING = "/ipfs/ping/1.0.0"
_PING_BYTES = 32
_IDENTIFY = "/ipfs/id/1.0.0"
_MAX_IDENTIFIED = 65_536  # bytes; an honest one has a few hundred
_MAX_VARINT = 10  # bytes of 64 bits
_AGENT, _PROTOCOL = 6, 3  # field numbers


@dataclass(frozen=True, slots=True)
class Identified:
    """What a peer says it is; nothing of it is proven."""

    agent: str
    protocols: tuple[str, ...]


async def ping(overlay: Overlay, peer_id: str, *, timeout: float) -> Pong:
    """One round trip to a peer that there is a connection to, on a stream of its own: it takes the best one.

    https://github.com/libp2p/specs/blob/master/ping/ping.md

    Raises:
        NetworkError: no answer within `timeout` seconds.
    """
    with trio.move_on_after(timeout):
        async with await overlay.open_stream(peer_id, _PING, timeout=timeout) as stream:
            started = trio.current_time()
            await stream.send_all(bytes(_PING_BYTES))
            await _read_exactly(stream, _PING_BYTES)
            return Pong(trio.current_time() - started, "relayed" if stream.is_relayed else "direct")
    raise NetworkError(f"{peer_id} did not answer within {timeout:g} s", code="no_answer")


async def identify(overlay: Overlay, peer_id: str, *, timeout: float) -> Identified:
    """Ask a connected peer what it is.

    https://github.com/libp2p/specs/blob/master/identify/README.md

    Raises:
        NetworkError: no answer within `timeout` seconds. ProtocolError: it is malformed.
    """
    with trio.move_on_after(timeout):
        async with await overlay.open_stream(peer_id, _IDENTIFY, timeout=timeout) as stream:
            size, _ = await _read_varint(stream)
            if size > _MAX_IDENTIFIED:
                raise ProtocolError(f"{peer_id} describes itself in {size} bytes", code="too_large")
            return parse_identified(await _read_exactly(stream, size))
    raise NetworkError(f"{peer_id} did not say what it is within {timeout:g} s", code="no_answer")


def parse_identified(data: bytes) -> Identified:
    """The agent and the protocols in a protobuf `Identify` message out of hostile bytes; other fields are skipped.

    Raises:
        ProtocolError: it is malformed.
    """
    agent, protocols, at = "", [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, at = _varint(data, at)
            continue
        size, at = _varint(data, at) if wire_type == 2 else ({1: 8, 5: 4}.get(wire_type, len(data)), at)
        value, at = data[at : at + size], at + size
        if at > len(data):
            raise ProtocolError("an identify message is malformed", code="bad_message")
        if (number, wire_type) == (_AGENT, 2):
            agent = value.decode(errors="replace")
        elif (number, wire_type) == (_PROTOCOL, 2):
            protocols.append(value.decode(errors="replace"))
    return Identified(agent, tuple(protocols))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT):
        if at + index >= len(data):
            break
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ProtocolError("an identify message is malformed", code="bad_message")


async def _read_varint(stream: OverlayStream) -> tuple[int, int]:
    taken = bytearray()
    while not taken or (taken[-1] >= 0x80 and len(taken) < _MAX_VARINT):
        taken += await _read_exactly(stream, 1)
    return _varint(bytes(taken), 0)


async def _read_exactly(stream: OverlayStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        got = await stream.receive_some(size - len(parts))
        if not got:
            raise NetworkError(f"{stream.peer_id} ended the stream before its answer", code="no_answer")
        parts += got
    return bytes(parts)
