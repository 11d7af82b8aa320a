"""Real hosts on loopback. Deadlines are generous: they only keep a hung test from hanging the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from azu.errors import ProtocolError, TrustError
from azu.overlay import Overlay, OverlayConfig, OverlayStream, open_overlay

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
LIMIT = 60.0  # seconds for one test's waiting


class Numbered:
    """Accepts b"<number>:<anything>" under /test-ns/..., prefers the larger number, dislikes b"bad"."""

    def validate(self, key: str, value: bytes) -> None:
        head, colon, body = value.partition(b":")
        if not colon or not head.isdigit():
            raise ProtocolError("no number")
        if body == b"bad":
            raise TrustError("bad signature")
        if body == b"bug":
            raise ZeroDivisionError("a validator with a bug")

    def select(self, key: str, values: Sequence[bytes]) -> int:
        return max(range(len(values)), key=lambda index: int(values[index].partition(b":")[0]))


def config(number: int, *, server: bool = True, listen: tuple[str, ...] = LOOPBACK) -> OverlayConfig:
    return OverlayConfig(number.to_bytes(32, "big"), listen, server, validators={"test-ns": Numbered()})


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def receive_exactly(stream: OverlayStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        assert part, f"stream ended after {len(data)} of {size} bytes"
        data += part
    return bytes(data)


@asynccontextmanager
async def _swarm(size: int) -> AsyncIterator[list[Overlay]]:
    async with _opened(size, []) as nodes:
        for node in nodes[1:]:
            await node.bootstrap(nodes[0].addrs)
        yield nodes


@asynccontextmanager
async def _opened(size: int, nodes: list[Overlay]) -> AsyncIterator[list[Overlay]]:
    if len(nodes) == size:
        yield nodes
        return
    async with open_overlay(config(len(nodes) + 1)) as node, _opened(size, [*nodes, node]) as all_nodes:
        yield all_nodes


@pytest.fixture
def swarm() -> Callable[[int], AbstractAsyncContextManager[list[Overlay]]]:
    """`async with swarm(5) as nodes`: nodes[0] is the others' bootstrap node."""
    return _swarm


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Overlay, Overlay]]:
    """(server with /test/echo, client connected to it), under a deadline."""
    with trio.fail_after(LIMIT):
        async with open_overlay(config(1)) as server, open_overlay(config(2, server=False)) as client:
            server.handle("/test/echo", echo)
            await client.connect(server.peer_id, server.addrs)
            yield server, client
