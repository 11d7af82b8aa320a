"""Streams between real hosts: data, ends, faults, and what they must not do to each other."""

from __future__ import annotations

import hashlib
import logging
import socket

import pytest
import trio
import trio.testing

from azu.errors import InputError, InternalError, NetworkError, ProtocolError, TrustError
from azu.overlay import Overlay, OverlayStream, inbound, streams
from tests.overlay.conftest import receive_exactly

Pair = tuple[Overlay, Overlay]


async def test_round_trip_and_identity(pair: Pair) -> None:
    server, client = pair
    seen: list[str] = []

    async def who(stream: OverlayStream) -> None:
        seen.append(stream.peer_id)
        await stream.send_all(b"you")

    server.handle("/test/who", who)
    async with await client.open_stream(server.peer_id, "/test/who") as stream:
        assert await receive_exactly(stream, 3) == b"you"
        assert await stream.receive_some() == b""
        assert (stream.peer_id, stream.protocol) == (server.peer_id, "/test/who")
    assert seen == [client.peer_id]


async def test_large_transfer_is_intact(pair: Pair) -> None:
    server, client = pair
    data = hashlib.shake_256(b"seed").digest(20 * 1024 * 1024 + 7)

    async def digest(stream: OverlayStream) -> None:
        state = hashlib.sha256()
        while part := await stream.receive_some(1 << 20):
            state.update(part)
        await stream.send_all(state.digest())

    server.handle("/test/digest", digest)
    async with await client.open_stream(server.peer_id, "/test/digest") as stream:
        await stream.send_all(data[:10], bytearray(data[10:300]), memoryview(data)[300:], b"")
        await stream.send_eof()
        assert await receive_exactly(stream, 32) == hashlib.sha256(data).digest()


async def test_both_directions_at_once_many_streams(pair: Pair) -> None:
    server, client = pair

    async def one(number: int) -> None:
        data = bytes([number]) * 700_000
        async with await client.open_stream(server.peer_id, "/test/echo") as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)


async def test_concurrent_senders_do_not_interleave(pair: Pair) -> None:
    server, client = pair
    async with await client.open_stream(server.peer_id, "/test/echo") as stream, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(stream.send_all, bytes([number]) * 150_000, bytes([number]) * 50_000)
        data = await receive_exactly(stream, 800_000)
        turns = [data[at : at + 200_000] for at in range(0, 800_000, 200_000)]
        assert all(len(set(turn)) == 1 for turn in turns)


async def test_handler_errors_end_their_stream_only(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    server, client = pair
    caplog.set_level(logging.DEBUG, "azu.overlay")
    errors: list[Exception] = [
        ZeroDivisionError("oops"),
        ProtocolError("garbled"),
        TrustError("forged"),
        NetworkError("gone"),
        InternalError("disk"),
        ExceptionGroup("g", [TrustError("deep")]),
    ]

    async def fail(stream: OverlayStream) -> None:
        raise errors[(await stream.receive_some())[0]]

    server.handle("/test/fail", fail)
    for number in range(len(errors)):
        async with await client.open_stream(server.peer_id, "/test/fail") as stream:
            await stream.send_all(bytes([number]))
            assert await stream.receive_some() == b""  # reset reads as end (trap 5)
    async with await client.open_stream(server.peer_id, "/test/echo") as stream:
        await stream.send_all(b"still here")
        assert await receive_exactly(stream, 10) == b"still here"
    assert server.statistics().violations == {client.peer_id: 3}
    ours = [each for each in caplog.records if each.name == "azu.overlay.inbound"]
    assert [each.levelname for each in ours if each.exc_info] == ["ERROR", "ERROR"]
    assert sum(each.levelname == "WARNING" for each in ours) == 3


async def test_cancelled_send_breaks_no_other_stream(pair: Pair) -> None:
    server, client = pair

    async def stall(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    server.handle("/test/stall", stall)
    other = await client.open_stream(server.peer_id, "/test/echo")
    for _ in range(20):
        stream = await client.open_stream(server.peer_id, "/test/echo")
        with trio.move_on_after(0.001):
            await stream.send_all(bytes(200_000))
        await stream.reset()
        await other.send_all(b"ping")
        assert await receive_exactly(other, 4) == b"ping"
    await other.aclose()
    assert client.is_connected(server.peer_id)


async def test_waiting_for_the_turn_to_send_can_be_cancelled(pair: Pair) -> None:
    server, client = pair
    release = trio.Event()

    async def slow(stream: OverlayStream) -> None:
        await release.wait()
        while await stream.receive_some():
            pass

    server.handle("/test/slow", slow)
    async with await client.open_stream(server.peer_id, "/test/slow") as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(2_000_000))  # more than the window: holds the lock
        await trio.testing.wait_all_tasks_blocked(0.2)
        with trio.move_on_after(0.05) as scope:
            await stream.send_all(b"never")
        assert scope.cancelled_caught
        release.set()


async def test_a_peer_that_does_not_read_costs_its_stream_only(pair: Pair) -> None:
    server, client = pair

    async def stall(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    server.handle("/test/stall", stall)
    other = await client.open_stream(server.peer_id, "/test/echo")
    stream = await client.open_stream(server.peer_id, "/test/stall")
    with pytest.raises(NetworkError) as caught:
        await stream.send_all(bytes(20_000_000), timeout=0.5)
    assert caught.value.code == "write_timeout"
    with pytest.raises(NetworkError):
        await stream.send_all(b"more")
    await other.send_all(b"ping")
    assert await receive_exactly(other, 4) == b"ping"


async def test_cancelled_receive_loses_nothing(pair: Pair) -> None:
    server, client = pair

    async def drip(stream: OverlayStream) -> None:
        for number in range(200):
            await stream.send_all(number.to_bytes(2, "big") * 2000)

    server.handle("/test/drip", drip)
    data = bytearray()
    async with await client.open_stream(server.peer_id, "/test/drip") as stream:
        ended = False
        while not ended:
            with trio.move_on_after(0.0005):
                part = await stream.receive_some(1500)
                data += part
                ended = not part
    assert bytes(data) == b"".join(number.to_bytes(2, "big") * 2000 for number in range(200))


async def test_closing_wakes_our_own_reader(pair: Pair) -> None:
    server, client = pair
    stream = await client.open_stream(server.peer_id, "/test/echo")
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await stream.aclose()
    assert got == [b""]


async def test_close_delivers_what_was_sent_and_forgets_the_stream(pair: Pair) -> None:
    server, client = pair

    async def answer(stream: OverlayStream) -> None:
        await stream.send_all(bytes(200_000))  # fits the window; returns, and is closed, before it is read

    server.handle("/test/answer", answer)
    for _ in range(30):
        async with await client.open_stream(server.peer_id, "/test/answer") as stream:
            assert len(await receive_exactly(stream, 200_000)) == 200_000
            await stream.send_eof()  # the remote is gone: no error
    while client.statistics().streams or server.statistics().streams:
        await trio.sleep(0.05)
    for overlay in pair:
        for connections in overlay._swarm.get_connections_map().values():
            for each in connections:
                assert not each.muxed_conn.streams
                assert not each.muxed_conn.stream_events
                assert not each.muxed_conn._granted


async def test_close_and_reset_never_raise(pair: Pair) -> None:
    server, client = pair
    stream = await client.open_stream(server.peer_id, "/test/echo")
    await server.disconnect(client.peer_id)
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.aclose()
        await stream.reset()
        await stream.send_eof()
    assert await stream.receive_some() == b""
    with pytest.raises(NetworkError):
        await stream.send_all(b"x")


async def test_unknown_protocol_and_bad_names(pair: Pair) -> None:
    server, client = pair
    with pytest.raises(NetworkError, match="does not speak /test/nothing"):
        await client.open_stream(server.peer_id, "/test/nothing")
    with pytest.raises(InputError):
        await client.open_stream(server.peer_id, "no slash")
    with pytest.raises(InputError):
        await client.open_stream("nobody", "/test/echo")
    assert 0 < await client.ping(server.peer_id) < 60


async def test_inbound_streams_are_bounded_per_peer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = pair
    await trio.sleep(0.3)
    while server.statistics().streams:  # identify's own
        await trio.sleep(0.02)
    monkeypatch.setattr(inbound, "MAX_STREAMS_PER_PEER", 3)
    held = [await client.open_stream(server.peer_id, "/test/echo") for _ in range(3)]
    with pytest.raises(NetworkError):
        await client.open_stream(server.peer_id, "/test/echo")
    for stream in held:
        await stream.aclose()
    while server.statistics().streams:
        await trio.sleep(0.02)
    await (await client.open_stream(server.peer_id, "/test/echo")).aclose()


async def test_small_frames_do_not_wait_for_nagle(pair: Pair) -> None:
    for overlay in pair:
        for connections in overlay._swarm.get_connections_map().values():
            for each in connections:
                tcp = each.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream.stream
                assert tcp.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_joining_copies_small_buffers_only() -> None:
    large = memoryview(bytes(streams.JOIN_BYTES + 1))
    assert streams._joined((b"a", b"b", large, b"c", b"d")) == [b"ab", large, b"cd"]
    assert streams._joined((b"head", large))[1] is large
    assert streams._joined(()) == []
