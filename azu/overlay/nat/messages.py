"""Length-prefixed protobuf on a stream, and multiaddrs as the bytes in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from multiaddr import Multiaddr

from azu.errors import NetworkError, ProtocolError
from azu.overlay.addresses import peer_id_of
from azu.overlay.streams import OverlayStream

__all__ = [
    "MAX_ADDRESSES",
    "decode_addresses",
    "decode_peer",
    "encode_addresses",
    "framed",
    "read_message",
    "write_message",
]

MAX_MESSAGE = 4_096  # bytes; DCUtR says so, and go-libp2p for the others. An honest one has a few hundred
MAX_ADDRESSES = 16  # of one peer that are looked at

M = TypeVar("M", bound=Message)


async def write_message(stream: OverlayStream, message: Message) -> None:
    """Write one message.

    Raises:
        NetworkError: the peer is gone.
    """
    await stream.send_all(framed(message))


def framed(message: Message) -> bytes:
    """A message with its length before it."""
    payload = message.SerializeToString()
    return _varint(len(payload)) + payload


async def read_message(stream: OverlayStream, kind: type[M], *, limit: int = MAX_MESSAGE) -> M:
    """The next message, and not a byte beyond it.

    Raises:
        ProtocolError: it is malformed or too large. NetworkError: the stream ends first; the peer may have died.
    """
    length = shift = 0
    while True:
        byte = (await _read_exactly(stream, 1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 14:
            raise ProtocolError("the length of a message is malformed", code="bad_message")
    if length > limit:
        raise ProtocolError(f"a message of {length} bytes is over the limit", code="too_large")
    message = kind()
    try:
        message.ParseFromString(await _read_exactly(stream, length))
    except DecodeError as error:
        raise ProtocolError(f"a {kind.__name__} is malformed", code="bad_message") from error
    return message


def encode_addresses(addresses: Iterable[str]) -> list[bytes]:
    """Multiaddrs as bytes, the first MAX_ADDRESSES of them."""
    return [Multiaddr(each).to_bytes() for each in list(addresses)[:MAX_ADDRESSES]]


def decode_addresses(encoded: Iterable[bytes]) -> list[str]:
    """The /ip4 and /ip6 TCP addresses among what a peer sent, without duplicates and without a /p2p part."""
    found: dict[str, None] = {}
    for raw in list(encoded)[:MAX_ADDRESSES]:
        try:
            parts = [(protocol.name, str(value)) for protocol, value in Multiaddr(raw).items()]
        except Exception:  # noqa: S112 - a stranger's bytes; py-multiaddr raises a dozen types
            continue
        names = [name for name, _ in parts]
        if names[:2] in (["ip4", "tcp"], ["ip6", "tcp"]) and names[2:] in ([], ["p2p"]) and parts[1][1] != "0":
            found.setdefault("".join(f"/{name}/{value}" for name, value in parts[:2]))
    return list(found)


def decode_peer(raw: bytes) -> str:
    """The peer id of these bytes.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return str(peer_id_of(raw))
    except Exception as error:
        raise ProtocolError("a peer id is malformed", code="bad_message") from error


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


async def _read_exactly(stream: OverlayStream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = await stream.receive_some(size - len(parts))
        if not part:
            raise NetworkError(f"{stream.peer_id} ended the stream before a whole message", code="stream_ended")
        parts += part
    return bytes(parts)
