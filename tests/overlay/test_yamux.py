"""What a hostile or unlucky remote does to our muxer: two real muxers, or one and hand-made frames, over memory."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from azu.overlay import _yamux, _yamux_stream
from azu.overlay._outbox import SMALL_BYTES
from azu.overlay._yamux import AzuYamux
from tests.turns import counted_turns

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


class Session:
    """Stands for a Noise session and its link: whole messages over a memory stream, of which nothing is encrypted."""

    def __init__(self, out: trio.MemorySendChannel[bytes], come: trio.MemoryReceiveChannel[bytes], first: bool) -> None:
        self.out, self.come, self.is_initiator = out, come, first

    def leftover(self) -> bytes:
        return b""

    async def receive(self) -> list[bytes]:
        return [await self.read_msg()]

    async def send(self, plaintexts: Sequence[bytes]) -> None:
        await self.write(b"".join(plaintexts))

    async def read_msg(self) -> bytes:
        return await self.come.receive()

    async def write(self, data: bytes) -> None:
        await self.out.send(bytes(data))

    async def close(self) -> None:
        self.out.close()
        self.come.close()


@asynccontextmanager
async def muxer_and_wire() -> AsyncIterator[tuple[AzuYamux, Any]]:
    """Our muxer (responder: its own streams are even) and the raw end of its wire."""
    send_a, receive_a = trio.open_memory_channel[bytes](1000)
    send_b, receive_b = trio.open_memory_channel[bytes](1000)
    session: Any = Session(send_a, receive_b, False)
    peer: Any = "peer"
    muxer = AzuYamux(session, peer, False, session)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
            yield muxer, Session(send_b, receive_a, True)
            nursery.cancel_scope.cancel()


def frame(kind: int, flags: int, sid: int, length: int, payload: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, sid, length) + payload


async def heard(wire: Session) -> bytes:
    """The next frame that is no measurement of the round trip."""
    while (answer := await wire.read_msg())[1] == PING:
        pass
    return answer


async def ended(muxer: AzuYamux) -> None:
    await muxer.event_closed.wait()


async def test_frames_may_be_cut_anywhere() -> None:
    async with muxer_and_wire() as (muxer, wire):
        text = frame(WINDOW, SYN, 1, 0) + frame(DATA, 0, 1, 5, b"hello") + frame(DATA, FIN, 1, 6, b" world")
        for at in range(len(text)):
            await wire.write(text[at : at + 1])
        stream: Any = await muxer.accept_stream()
        got = b""
        while len(got) < 11:
            got += await stream.read(3)
        assert got == b"hello world"
        with pytest.raises(MuxedStreamEOF):
            await stream.read(3)


async def test_a_reader_that_waits_has_what_comes_a_turn_after_it_came() -> None:
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(frame(WINDOW, SYN, 1, 0))
        stream: Any = await muxer.accept_stream()
        async with trio.open_nursery() as nursery:
            read: list[tuple[bytes, int]] = []

            async def read_one() -> None:
                data = await stream.read(5)
                read.append((data, turns.count))

            nursery.start_soon(read_one)
            await trio.testing.wait_all_tasks_blocked()
            with counted_turns() as turns:
                await wire.write(frame(DATA, 0, 1, 5, b"hello"))  # the muxer takes it in the next turn
                await trio.testing.wait_all_tasks_blocked()
        assert read == [(b"hello", 2)]


async def test_bytes_beyond_the_window_end_the_connection() -> None:
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(frame(WINDOW, SYN, 1, 0))
        chunk = bytes(64 * 1024)
        for _ in range(5):  # the window is 256 KiB
            await wire.write(frame(DATA, 0, 1, len(chunk), chunk))
        await ended(muxer)
        assert not muxer.stream_buffers


async def test_a_huge_announced_frame_ends_the_connection_before_it_comes() -> None:
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(frame(WINDOW, SYN, 1, 0) + frame(DATA, 0, 1, 0xFFFF_FFFF))
        await ended(muxer)


@pytest.mark.parametrize(
    "text",
    [
        b"\x01" + bytes(11),
        frame(9, 0, 0, 0),
        frame(GO_AWAY, 0, 0, 0),
        frame(WINDOW, SYN, 2, 0),
        frame(WINDOW, SYN, 0, 0),
        frame(WINDOW, SYN, 1, 0) * 2,
        frame(PING, SYN, 0, 1) * 2000,
    ],
)
async def test_broken_frames_end_the_connection(text: bytes) -> None:
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(text)
        await ended(muxer)


async def test_frames_of_unknown_streams_are_skipped() -> None:
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(frame(DATA, 0, 77, 4, b"what") + frame(WINDOW, RST, 78, 0) + frame(PING, SYN, 0, 42))
        while (answer := await wire.read_msg()) != frame(PING, ACK, 0, 42):
            assert answer[1] == PING  # our own round-trip measurement
        assert not muxer.streams


async def test_too_many_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yamux, "MAX_REMOTE_STREAMS", 2)
    async with muxer_and_wire() as (muxer, wire):
        for number in range(6):
            await wire.write(frame(WINDOW, SYN, 2 * number + 1, 0))
        answers = [frame(WINDOW, RST, 2 * number + 1, 0) for number in range(2, 6)]
        got: list[bytes] = []
        while len(got) < len(answers):  # those that wait at the same time come as one message
            message = await wire.read_msg()
            frames = [message[at : at + 12] for at in range(0, len(message), 12)]
            got += [each for each in frames if each[1] != PING]  # a keep-alive may be among them
        assert sorted(got) == sorted(answers)
        assert sorted(muxer.streams) == [1, 3]


async def test_a_streams_first_frame_opens_or_accepts_it() -> None:
    async with muxer_and_wire() as (muxer, wire):
        mine = await muxer.open_stream()
        await mine.write(b"one")
        await mine.write(b"two")
        assert await heard(wire) == frame(DATA, SYN, 2, 3, b"one")
        assert await heard(wire) == frame(DATA, 0, 2, 3, b"two")
        await wire.write(frame(DATA, SYN, 1, 5, b"hello"))
        theirs: Any = await muxer.accept_stream()
        assert await theirs.read(10) == b"hello"
        await theirs.close()
        assert await heard(wire) == frame(WINDOW, ACK | FIN, 1, 0)


async def test_nobody_hears_of_a_stream_that_is_given_up_before_its_first_frame() -> None:
    async with muxer_and_wire() as (muxer, wire):
        await (await muxer.open_stream()).reset()
        closed = await muxer.open_stream()
        await closed.close()
        assert await heard(wire) == frame(WINDOW, SYN | FIN, 4, 0)
        assert list(muxer.streams) == [4]


async def test_a_first_write_that_is_cancelled_before_it_left_leaves_the_opening_to_the_next() -> None:
    async with muxer_and_wire() as (muxer, wire):
        busy: Any = muxer.secured_conn
        out = busy.out
        busy.out, taken = trio.open_memory_channel[bytes](0)
        stream: Any = await muxer.open_stream()
        other = await muxer.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.write, b"first")
            await trio.testing.wait_all_tasks_blocked()
            window = stream.send_window
            with trio.move_on_after(0.01):
                await stream.write(bytes(SMALL_BYTES))  # what is smaller would leave with the next call
            assert stream.send_window == window
            assert await taken.receive() == frame(DATA, SYN, 4, 5, b"first")
        busy.out = out
        await stream.write(b"kept")
        assert await heard(wire) == frame(DATA, SYN, 2, 4, b"kept")


async def test_writer_waits_for_window_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yamux_stream, "WINDOW_SECONDS", 0.3)
    async with muxer_and_wire() as (muxer, wire):
        stream = await muxer.open_stream()

        async def grant_later() -> None:
            await trio.testing.wait_all_tasks_blocked(0.05)
            await wire.write(frame(WINDOW, ACK, 2, 10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grant_later)
            await stream.write(bytes(256 * 1024 + 10))
        with pytest.raises(MuxedStreamError, match="window"):
            await stream.write(b"x")


async def test_reset_wakes_reader_and_writer_after_what_was_sent() -> None:
    async with muxer_and_wire() as (muxer, wire):
        stream: Any = await muxer.open_stream()
        await wire.write(frame(DATA, ACK, 2, 3, b"abc") + frame(WINDOW, RST, 2, 0))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await stream.read(10) == b"abc"
        with pytest.raises((MuxedStreamReset, MuxedStreamEOF)):
            await stream.read(10)
        with pytest.raises(MuxedStreamError):
            await stream.write(b"x")
        assert not muxer.streams
        assert muxer.stream_backlog_semaphore.value == 256


async def test_a_stuck_socket_ends_the_connection_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yamux, "FRAME_SECONDS", 0.3)
    async with muxer_and_wire() as (muxer, _):
        stream = await muxer.open_stream()
        full: Any = muxer.secured_conn
        full.out, _never_read = trio.open_memory_channel[bytes](0)
        with pytest.raises(Exception, match="took no bytes"):
            await stream.write(b"x")
        await ended(muxer)


async def test_credit_grows_the_window_within_the_connections_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yamux, "EXTRA_WINDOWS", 256 * 1024)
    async with muxer_and_wire() as (muxer, wire):
        streams: list[Any] = [await muxer.open_stream() for _ in range(2)]
        for stream in streams:
            await stream.write(b"?")
            await wire.write(frame(DATA, 0, stream.stream_id, 65536, bytes(65536)) * 2)
        for stream in streams:
            left = 131072
            while left:
                left -= len(await stream.read(65536))
        granted = [await heard(wire) for _ in range(4)][2:]
        assert granted == [frame(WINDOW, 0, 2, 131072 + 262144), frame(WINDOW, 0, 4, 131072)]
        for stream in streams:
            await stream.reset()
        assert muxer._granted == 0


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_frame_of_the_librarys_own_is_written_whole_though_its_caller_is_cancelled(
    leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a frame is sealed and not sent, the other end takes all that follows for forged."""
    async with muxer_and_wire() as (muxer, wire):
        await wire.write(frame(WINDOW, SYN, 1, 0))
        stream: Any = await muxer.accept_stream()
        session: Any = muxer.secured_conn
        begun, written, full = 0, 0, trio.Event()
        write = session.send

        async def send(plaintexts: Sequence[bytes]) -> None:
            nonlocal begun, written
            begun += 1
            await full.wait()
            await write(plaintexts)
            written += 1

        monkeypatch.setattr(session, "send", send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(stream, leave))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            full.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (begun, written) == (1, 1)
