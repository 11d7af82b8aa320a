"""Streams between azu's muxer and js-libp2p's: windows, half-close, reset, refusal, and a peer that dies."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest
import trio

from azu.errors import NetworkError
from azu.overlay import Overlay, OverlayStream
from tests.foreign.conftest import OpenJs, dialled
from tests.foreign.js_peer import JsPeer
from tests.overlay.conftest import LIMIT

MIB = 1 << 20
# None, one byte, a whole first window and a byte more, and twice js-libp2p's largest window (eight times ours)
SIZES = (0, 1, 262_144, 262_145, 32 * MIB)
PATTERN = bytes(range(256)) * 256


@pytest.fixture
def serving(node: Overlay) -> Overlay:
    """The node with the same protocols as peer.mjs."""

    async def echo(stream: OverlayStream) -> None:
        while data := await stream.receive_some(MIB):
            await stream.send_all(data)

    async def digest(stream: OverlayStream) -> None:
        seen = hashlib.sha256()
        while data := await stream.receive_some(MIB):
            seen.update(data)
        await stream.send_all(seen.digest())

    async def lazy(stream: OverlayStream) -> None:
        await trio.sleep(1.0)
        await echo(stream)

    async def reset(stream: OverlayStream) -> None:
        await stream.receive_some(1)
        await stream.reset()

    for handler in (echo, digest, lazy, reset):
        node.handle(f"/test/{handler.__name__}", handler)
    return node


async def pour(stream: OverlayStream, size: int, *, eof: bool = True) -> None:
    for at in range(0, size, len(PATTERN)):
        await stream.send_all(PATTERN[: size - at])
    if eof:
        await stream.send_eof()


async def received(stream: OverlayStream) -> AsyncIterator[bytes]:
    while data := await stream.receive_some(MIB):
        yield data


async def test_what_js_sends_comes_back_whole(serving: Overlay, js: JsPeer) -> None:
    for size in SIZES:
        got = await js.call("echo", peer=serving.peer_id, size=size)
        assert got["count"] == size
        assert got["received"] == got["sent"]
        assert got["status"] == "closed"
    await no_streams(serving)


async def test_what_js_is_sent_comes_back_whole(serving: Overlay, js: JsPeer) -> None:
    for size in SIZES:
        digest, count = hashlib.sha256(), 0
        async with await serving.open_stream(js.peer_id, "/test/echo") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(pour, stream, size)
            async for data in received(stream):
                digest.update(data)
                count += len(data)
        assert count == size
        assert digest.digest() == hashlib.sha256((PATTERN * (size // len(PATTERN) + 1))[:size]).digest()
    await no_streams(serving)


async def no_streams(node: Overlay) -> None:
    """Wait until none is left: identify and the DHT have theirs as well."""
    with trio.fail_after(LIMIT):
        while node.statistics().streams:
            await trio.sleep(0.02)


@pytest.mark.parametrize("protocol", ["/test/digest", "/test/lazy"])
async def test_a_half_closed_stream_is_still_read(serving: Overlay, js: JsPeer, protocol: str) -> None:
    """The answer comes after the end of the question; `lazy` has its reader wait while the window is used up."""
    size = 6 * MIB
    async with await serving.open_stream(js.peer_id, protocol) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(pour, stream, size)
        answer = b"".join([data async for data in received(stream)])
    if protocol == "/test/digest":
        assert answer == hashlib.sha256(PATTERN * (size // len(PATTERN))).digest()
    else:
        assert answer == PATTERN * (size // len(PATTERN))
    got = await js.call("echo", peer=serving.peer_id, size=size, protocol=protocol)
    if protocol == "/test/digest":
        assert got["count"] == 32
    else:
        assert got["received"] == got["sent"]


async def test_a_reset_reaches_the_other_side(serving: Overlay, js: JsPeer) -> None:
    ended = await js.call("ending", peer=serving.peer_id, protocol="/test/reset")
    assert ended == {"status": "reset", "error": "StreamResetError"}

    async with await serving.open_stream(js.peer_id, "/test/reset") as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b""
        with pytest.raises(NetworkError):
            await stream.send_all(b"x")

    await js.call("reset", peer=serving.peer_id, protocol="/test/echo")
    await no_streams(serving)
    assert await js.call("ping", peer=serving.peer_id) >= 0  # the connection does not suffer


async def test_unknown_protocols_are_refused(serving: Overlay, js: JsPeer) -> None:
    with pytest.raises(NetworkError) as caught:
        await serving.open_stream(js.peer_id, "/test/unknown")
    # js-libp2p resets the stream after its no, and may overtake that.
    assert caught.value.code in ("protocol_unsupported", "unreachable")
    # It asks for one after the other.
    assert await js.call("negotiate", peer=serving.peer_id, protocols=["/test/unknown", "/test/echo"]) == "/test/echo"


async def test_many_streams_at_once(serving: Overlay, js: JsPeer) -> None:
    size = 300_000

    async def there_and_back() -> None:
        async with await serving.open_stream(js.peer_id, "/test/echo") as stream, trio.open_nursery() as both:
            both.start_soon(pour, stream, size)
            assert sum([len(data) async for data in received(stream)]) == size

    async def back_and_there() -> None:
        assert (await js.call("echo", peer=serving.peer_id, size=size))["count"] == size

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(there_and_back)
            nursery.start_soon(back_and_there)
    await no_streams(serving)


async def test_a_killed_peer_ends_its_streams_and_nobody_elses(serving: Overlay, js: JsPeer, open_js: OpenJs) -> None:
    async with open_js() as other:
        await dialled(other, serving)
        stream = await serving.open_stream(js.peer_id, "/test/echo")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour_until_it_breaks, stream)
            await stream.receive_some(MIB)
            js.kill()
            with trio.fail_after(5):
                async for _ in received(stream):
                    pass
        assert not serving.is_connected(js.peer_id)
        assert (await other.call("echo", peer=serving.peer_id, size=MIB))["count"] == MIB


async def pour_until_it_breaks(stream: OverlayStream) -> None:
    try:
        while True:
            await stream.send_all(PATTERN)
    except NetworkError:
        return


async def test_a_stopped_peer_holds_up_nobody_else_and_loses_nothing(
    serving: Overlay, js: JsPeer, open_js: OpenJs
) -> None:
    size, answer = 4 * MIB, bytearray()
    async with open_js() as other:
        await dialled(other, serving)
        async with await serving.open_stream(js.peer_id, "/test/echo") as stream, trio.open_nursery() as nursery:
            js.stop()
            nursery.start_soon(pour, stream, size)
            for _ in range(5):
                with trio.fail_after(5):
                    assert (await other.call("echo", peer=serving.peer_id, size=MIB))["count"] == MIB
                await trio.sleep(0.1)
            js.go_on()
            async for data in received(stream):
                answer += data
    assert answer == PATTERN * (size // len(PATTERN))


async def test_goodbyes_are_understood(serving: Overlay, js: JsPeer, open_js: OpenJs) -> None:
    """Said again while there is a connection, as js-libp2p's DHT may dial anew for a query of its own meanwhile."""
    while await js.call("connections"):
        await serving.disconnect(js.peer_id)
        await trio.sleep(0.02)
    await dialled(js, serving)
    assert await js.call("connections") == [[serving.peer_id, False]]
    while serving.is_connected(js.peer_id):
        await js.call("hangUp", peer=serving.peer_id)
        await trio.sleep(0.02)


async def test_azu_dials_js(serving: Overlay, open_js: OpenJs) -> None:
    """The other roles in Noise, Yamux and identify."""
    async with open_js() as js:
        await serving.connect(js.peer_id, js.addrs)
        while js.peer_id not in serving.peers_with("/test/echo"):
            await trio.sleep(0.02)
        assert await serving.ping(js.peer_id) > 0
        assert await js.call("connections") == [[serving.peer_id, False]]
        assert (await js.call("echo", peer=serving.peer_id, size=MIB))["count"] == MIB
        await js.call("handle", protocol="/test/new")  # told by identify push
        while js.peer_id not in serving.peers_with("/test/new"):
            await trio.sleep(0.02)
