"""Open a stream and agree on its protocol (multistream-select) in one round trip; upstream takes two."""

from __future__ import annotations

from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID

from azu.errors import InputError, NetworkError
from azu.overlay.faults import shielded

__all__ = ["negotiate"]

_HELLO = b"/multistream/1.0.0\n"
_REFUSED = b"na\n"
MAX_LINE = 1024  # bytes of a protocol name


async def negotiate(swarm: Swarm, peer_id: ID, protocol: str) -> INetStream:
    """A stream on which the peer has accepted `protocol`.

    Raises:
        NetworkError: it does not speak the protocol. libp2p's errors otherwise (the caller maps them).
    """
    wish = protocol.encode() + b"\n"
    if not protocol.startswith("/") or len(wish) > MAX_LINE:
        raise InputError(f"{protocol[:60]!r} is not a protocol name", code="bad_protocol")
    stream = await swarm.new_stream(peer_id)
    try:
        await stream.write(_line(_HELLO) + _line(wish))
        hello, answer = await _read_line(stream), await _read_line(stream)
    except BaseException:
        await _abandon(stream)
        raise
    if hello != _HELLO or answer != wish:
        await _abandon(stream)
        why = "does not speak" if answer == _REFUSED else "answered nonsense when asked for"
        raise NetworkError(f"{peer_id} {why} {protocol}", code="protocol_unsupported")
    stream.set_protocol(TProtocol(protocol))
    return stream


def _line(text: bytes) -> bytes:
    size = len(text)
    return (bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])) + text


async def _read_line(stream: INetStream) -> bytes:
    length = shift = 0
    while True:
        byte = (await _read_exactly(stream, 1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift > 14:
            raise NetworkError("the peer's answer is too long", code="protocol_unsupported")
    if length > MAX_LINE:
        raise NetworkError("the peer's answer is too long", code="protocol_unsupported")
    return await _read_exactly(stream, length)


async def _read_exactly(stream: INetStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += await stream.read(size - len(parts))
    return bytes(parts)


async def _abandon(stream: INetStream) -> None:
    with shielded(1.0):
        await stream.reset()
