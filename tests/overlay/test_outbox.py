"""Who writes when: all that waits leaves together, streams keep their order, and nobody is forgotten."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError

from azu.overlay._outbox import ALONE, LARGE_BYTES, SMALL_BYTES, Outbox
from tests.turns import counted_turns

LIMIT = 60.0


def frame(stream: int, size: int, number: int = 0) -> bytes:
    """A frame of a stream, with a number at its front."""
    return struct.pack("!BBHII", 0, 0, 0, stream, size) + number.to_bytes(4, "big") + bytes(max(0, size - 16))


def stream_of(sent: bytes) -> int:
    return int.from_bytes(sent[4:8], "big")


class Socket:
    """Notes what is written; each call waits until it may go on."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []
        self.may_go_on = trio.Semaphore(0)
        self.error: Exception | None = None

    async def send(self, frames: Sequence[bytes]) -> None:
        self.calls.append(list(frames))
        with trio.CancelScope(shield=True):
            await self.may_go_on.acquire()
        if self.error is not None:
            raise self.error


async def test_who_writes_in_the_same_turn_goes_together() -> None:
    socket = Socket()
    outbox = Outbox(socket.send)
    socket.may_go_on.release()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for stream in range(16):
                nursery.start_soon(outbox.write, [frame(stream, 2_000)])
    assert [len(call) for call in socket.calls] == [16]


async def test_who_never_meets_another_writer_does_not_wait_for_one() -> None:
    socket = Socket()
    outbox = Outbox(socket.send)
    with trio.fail_after(LIMIT):
        for number in range(ALONE + 2):
            socket.may_go_on.release()
            with counted_turns() as turns:
                await outbox.write([frame(0, 100)])
            assert turns.count == (2 if number < ALONE else 1), number
        for calls in ([1, 1], [2]):  # two meet once, and go together from then on
            socket.calls.clear()
            for _ in range(2):
                socket.may_go_on.release()
            async with trio.open_nursery() as nursery:
                for stream in range(2):
                    nursery.start_soon(outbox.write, [frame(stream, 100)])
            assert [len(call) for call in socket.calls] == calls


async def calls_of(*writes: tuple[int, int], urgent: int = -1) -> list[list[tuple[int, int]]]:
    """What leaves with each call, where streams write frames of these sizes one after another while one is sent."""
    socket = Socket()
    outbox = Outbox(socket.send)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for stream, size in ((0, 100), *writes):
                nursery.start_soon(partial(outbox.write, [frame(stream, size)], is_urgent=stream == urgent))
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(1 + len(writes)):
                socket.may_go_on.release()
    return [[(stream_of(each), len(each)) for each in call] for call in socket.calls]


async def test_small_frames_overtake_large_ones_but_not_those_of_their_own_stream() -> None:
    order = await calls_of((1, LARGE_BYTES), (2, LARGE_BYTES), (2, 100), (3, 100))
    assert order == [[(0, 100)], [(3, 100), (1, LARGE_BYTES)], [(2, LARGE_BYTES)], [(2, 100)]]


async def test_an_urgent_stream_overtakes_others_however_much_it_writes() -> None:
    order = await calls_of((1, LARGE_BYTES), (2, LARGE_BYTES), (3, LARGE_BYTES), urgent=3)
    assert order == [[(0, 100)], [(3, LARGE_BYTES), (1, LARGE_BYTES)], [(2, LARGE_BYTES)]]


async def test_a_writer_that_gives_up_leaves_nothing_and_holds_up_nobody() -> None:
    socket = Socket()
    outbox = Outbox(socket.send)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.write, [frame(0, 100)])
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(outbox.write, [frame(1, LARGE_BYTES)])
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            nursery.start_soon(outbox.write, [frame(2, 100)])
            socket.may_go_on.release()
            socket.may_go_on.release()
        await outbox_is_idle(outbox, socket)
    assert [[stream_of(each) for each in call] for call in socket.calls] == [[0], [2], [9]]


@pytest.mark.parametrize("others", [0, 1, 2])
@pytest.mark.parametrize("size", [100, LARGE_BYTES])
async def test_a_writer_that_gives_up_as_its_turn_comes_passes_it_on(size: int, others: int) -> None:
    """Cancelled and called to send in one turn of the event loop. What is small leaves then, and is no less whole."""
    socket, scope = Socket(), trio.CancelScope()

    async def send(frames: Sequence[bytes]) -> None:
        await socket.send(frames)
        scope.cancel()

    async def give_up() -> None:
        with scope:
            await outbox.write([frame(1, size)])

    outbox = Outbox(send)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.write, [frame(0, 100)])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(give_up)
            await trio.testing.wait_all_tasks_blocked()
            for other in range(others):
                nursery.start_soon(outbox.write, [frame(2 + other, 100)])
            await trio.testing.wait_all_tasks_blocked()
            socket.may_go_on.release()
            socket.may_go_on.release()
        await outbox_is_idle(outbox, socket)
    first = 1 if size <= SMALL_BYTES else 2
    assert sorted(stream_of(each) for call in socket.calls for each in call) == [0, *range(first, 2 + others), 9]


async def test_a_small_frame_that_waits_leaves_although_its_writer_is_cancelled() -> None:
    """It goes with the next call, so its stream needs no shield to stay whole. Behind a large one it is given up."""
    socket, done = Socket(), list[str]()
    outbox = Outbox(socket.send)

    async def write(name: str, *frames: bytes) -> None:
        await outbox.write(frames)
        done.append(name)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.write, [frame(0, 100)])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(outbox.write, [frame(2, LARGE_BYTES)])
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as inner:
                inner.start_soon(write, "alone", frame(1, 100))
                inner.start_soon(write, "behind a large one", frame(2, 100))
                await trio.testing.wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
                for _ in range(3):
                    socket.may_go_on.release()
    assert done == ["alone"]
    assert [[stream_of(each) for each in call] for call in socket.calls] == [[0], [1, 2]]


async def outbox_is_idle(outbox: Outbox, socket: Socket) -> None:
    socket.may_go_on.release()
    await outbox.write([frame(9, 20)])


async def test_all_whose_frames_a_broken_socket_took_are_told() -> None:
    socket = Socket()
    outbox = Outbox(socket.send)
    socket.error = OSError("cable cut")
    told: list[str] = []

    async def write(stream: int) -> None:
        with pytest.raises((OSError, ConnectionClosedError), match="cable cut") as raised:
            await outbox.write([frame(stream, 100)])
        told.append(type(raised.value).__name__)

    for _ in range(2):
        socket.may_go_on.release()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for stream in range(3):
                nursery.start_soon(write, stream)
        await write(4)
    assert sorted(told) == ["ConnectionClosedError", "ConnectionClosedError", "OSError", "OSError"]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([20, SMALL_BYTES, SMALL_BYTES + 1, LARGE_BYTES]))))
def test_every_frame_leaves_once_and_each_stream_in_order(writes: list[tuple[int, int]]) -> None:
    socket = Socket()
    outbox = Outbox(socket.send)

    async def main() -> None:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                for number, (stream, size) in enumerate(writes):
                    nursery.start_soon(outbox.write, [frame(stream, size, number)])
                    await trio.testing.wait_all_tasks_blocked()
                for _ in writes:
                    socket.may_go_on.release()

    trio.run(main)
    sent = [each for call in socket.calls for each in call]
    numbers = {
        stream: [int.from_bytes(each[12:16], "big") for each in sent if stream_of(each) == stream]
        for stream in range(4)
    }
    assert sum(map(len, numbers.values())) == len(writes)
    assert all(each == sorted(each) for each in numbers.values())
    for call in socket.calls:
        large = [len(each) for each in call if len(each) > SMALL_BYTES]
        assert len(large) <= 1 or sum(large) <= LARGE_BYTES
