"""Open a stream and agree on its protocol (multistream-select) in one round trip; upstream takes two.

What is written at once costs one frame, and one wake-up of the other end; upstream writes each line on its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID

from azu.errors import InputError, NetworkError
from azu.overlay.faults import shielded

__all__ = ["accept", "negotiate"]

_HELLO = b"/multistream/1.0.0\n"
_REFUSED = b"na\n"
MAX_LINE = 1024  # bytes of a protocol name
MAX_WISHES = 100  # protocols that a peer may ask for, one after the other


async def negotiate(swarm: Swarm, peer_id: ID, protocol: str, opening: bytes = b"") -> INetStream:
    """A stream on which the peer has accepted `protocol`.

    Args:
        opening: what to send at once, before the peer has said whether it speaks the protocol.

    Raises:
        NetworkError: it does not speak the protocol. libp2p's errors otherwise (the caller maps them).
    """
    wish = protocol.encode() + b"\n"
    if not protocol.startswith("/") or len(wish) > MAX_LINE:
        raise InputError(f"{protocol[:60]!r} is not a protocol name", code="bad_protocol")
    stream = await swarm.new_stream(peer_id)
    try:
        await stream.write(_line(_HELLO) + _line(wish) + opening)
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


async def accept(stream: Any, spoken: Collection[str]) -> str:
    """Agree with the peer that opened the stream on a protocol out of `spoken`.

    Raises:
        NetworkError: it speaks another language, or asks for nothing that we speak. libp2p's errors where it goes.
    """
    if await _read_line(stream) != _HELLO:
        raise NetworkError("the peer does not speak multistream-select", code="protocol_unsupported")
    answer = _line(_HELLO)
    if not stream.muxed_stream.has_unread:  # it waits for our greeting before it says what it wants
        await stream.write(answer)
        answer = b""
    for _ in range(MAX_WISHES):
        wish = await _read_line(stream)
        protocol = wish[:-1].decode(errors="replace")
        if protocol in spoken:
            await stream.write(answer + _line(wish))
            return protocol
        await stream.write(answer + _line(_REFUSED))
        answer = b""
    raise NetworkError("the peer asked for too many protocols", code="protocol_unsupported")


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
