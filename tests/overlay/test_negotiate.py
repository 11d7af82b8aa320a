"""Agreeing on a stream's protocol, with peers that write line by line, all at once, or nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from libp2p.exceptions import BaseLibp2pError

from azu.errors import NetworkError
from azu.overlay import Overlay
from azu.overlay.addresses import parse_peer_id
from azu.overlay.negotiate import MAX_WISHES, negotiate

HELLO = b"\x13/multistream/1.0.0\n"
ECHO = b"\x0b/test/echo\n"
UNKNOWN = b"\x0e/test/unknown\n"
REFUSED = b"\x03na\n"


async def raw_stream(pair: tuple[Overlay, Overlay]) -> Any:
    server, client = pair
    return await client._swarm.new_stream(parse_peer_id(server.peer_id))


async def read_exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


async def test_line_by_line_as_upstream_writes_it(pair: tuple[Overlay, Overlay]) -> None:
    stream = await raw_stream(pair)
    for line, answer in ((HELLO, HELLO), (UNKNOWN, REFUSED), (ECHO, ECHO), (b"text", b"text")):
        await stream.write(line)
        assert await read_exactly(stream, len(answer)) == answer


async def test_all_at_once_and_the_first_words_with_it(pair: tuple[Overlay, Overlay]) -> None:
    stream = await raw_stream(pair)
    await stream.write(HELLO + UNKNOWN + UNKNOWN + ECHO + b"text")
    wanted = HELLO + REFUSED + REFUSED + ECHO + b"text"
    assert await read_exactly(stream, len(wanted)) == wanted


async def test_our_own_way(pair: tuple[Overlay, Overlay]) -> None:
    server, client = pair
    stream = await negotiate(client._swarm, parse_peer_id(server.peer_id), "/test/echo", b"text")
    assert await read_exactly(stream, 4) == b"text"
    with pytest.raises(NetworkError, match="does not speak /test/unknown"):
        await negotiate(client._swarm, parse_peer_id(server.peer_id), "/test/unknown", b"text")


@pytest.mark.parametrize(
    "text",
    [
        b"\x13/multistream/2.0.0\n" + ECHO,
        b"\xff\xff\xff\xff" + ECHO,
        HELLO + b"\xff\xff\x7f" + bytes(100),
        HELLO + UNKNOWN * (MAX_WISHES + 1),
    ],
)
async def test_nonsense_ends_the_stream_and_nothing_else(pair: tuple[Overlay, Overlay], text: bytes) -> None:
    server, client = pair
    stream = await raw_stream(pair)
    await stream.write(text)
    with pytest.raises(BaseLibp2pError):
        await read_exactly(stream, 1_000_000)  # whatever was answered before the end
    assert client.is_connected(server.peer_id)
    await test_our_own_way(pair)
