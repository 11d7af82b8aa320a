"""The sending end of packs: what shares a frame, and what becomes of it when the stream ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Self

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from azu.channel import Channel
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.overlay import Overlay, OverlayStream
from azu.wire.frames import FrameReader
from azu.wire.messages import (
    MAX_PACK_BYTES,
    MAX_PACKED,
    PACK,
    PACK_PROTOCOL,
    Message,
    Nexts,
    Rows,
)
from node import packs
from node.instruments import RingMeter
from node.packs import Entry, PackLink, Packs, entries_of
from tests.node.real_stages import LIMIT, peer

WIDTH = 32
ROW = bytes(WIDTH * 4)


# --- frames


ENTRIES = st.one_of(
    st.builds(
        Entry, st.binary(min_size=16, max_size=16), st.integers(0, 2**31), st.integers(0, 10**6),
        body=st.integers(1, 4).map(lambda width: bytes(range(8)) * width),
        dtype=st.sampled_from(["float32", "bfloat16"]),
    ),
    st.builds(
        Entry, st.binary(min_size=16, max_size=16), st.integers(0, 2**31), st.integers(0, 10**6),
        token=st.integers(0, 2**31 - 1),
    ),
)  # fmt: skip


@given(st.lists(ENTRIES, min_size=1, max_size=40))
async def test_entries_arrive_as_they_were_added_and_alike_ones_together(entries: list[Entry]) -> None:
    stream = Stream()
    link = PackLink(Near(stream), "next", RingMeter())  # type: ignore[arg-type]
    left: list[AzuError | None] = []
    async with opened(link):
        for entry in entries:
            link.add(entry, left.append)
        await trio.testing.wait_all_tasks_blocked()
    received = [(message, body) for message, body in stream.messages()]
    arrived = [entry for message, body in received for entry in entries_of(message, body)]
    assert [(e.job_id, e.epoch, e.position, bytes(e.body), e.token) for e in arrived] == [
        (e.job_id, e.epoch, e.position, bytes(e.body), e.token) for e in entries
    ]
    assert left == [None] * len(entries)
    changes = sum(a.kind != b.kind for a, b in pairwise(entries))
    assert len(received) == 1 + changes


@pytest.mark.parametrize(("size", "most"), [(4, MAX_PACKED), (16_384, MAX_PACK_BYTES // 16_384)])
async def test_no_frame_is_larger_than_its_reader_takes(size: int, most: int) -> None:
    stream = Stream()
    link = PackLink(Near(stream), "next", RingMeter())  # type: ignore[arg-type]
    async with opened(link):
        for number in range(2 * most + 1):
            link.add(Entry(b"j" * 16, 0, number, bytes(size)), lambda _: None)
        await trio.testing.wait_all_tasks_blocked()
    assert [len(message.jobs) for message, _ in stream.messages()] == [most, most, 1]  # type: ignore[attr-defined]


def rows(*jobs: tuple[bytes, int, int], width: int = WIDTH, dtype: str = "float32", count: int | None = None) -> Rows:
    shape = (len(jobs) if count is None else count, width)
    return Rows.model_validate({"jobs": jobs, "tensor": {"dtype": dtype, "shape": shape}})


@pytest.mark.parametrize(("count", "size"), [(1, 2), (3, 2), (2, 1), (2, 3)])
def test_a_tensor_that_is_not_a_row_of_each_job_is_refused(count: int, size: int) -> None:
    with pytest.raises(ProtocolError) as raised:
        entries_of(rows((b"a" * 16, 0, 9), (b"b" * 16, 0, 9), count=count), bytearray(len(ROW) * size))
    assert raised.value.code == "bad_tensor"


# --- the stream


class Stream:
    """The sender's end of a stream whose other end reads all, and says nothing until `end`."""

    peer_id = "next"
    is_relayed = False

    def __init__(self) -> None:
        self.sent = bytearray()
        self.is_urgent = False
        self.error: NetworkError | None = None
        self.end = trio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def hurry(self) -> None:
        self.is_urgent = True

    async def send_all(self, *buffers: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        for buffer in buffers:
            self.sent += buffer

    async def receive_buffers(self, _: int) -> list[bytes]:
        await self.end.wait()
        return []

    def messages(self) -> list[tuple[Message, bytearray]]:
        reader, found = FrameReader(max_body=MAX_PACK_BYTES), []
        reader.receive_data(self.sent)
        while (frame := reader.next_frame()) is not None:
            found.append((PACK.decode(frame), frame.body))
        assert reader.is_idle
        return found


class Near:
    """An overlay with one stream to give."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    async def open_stream(self, *_: object) -> Stream:
        await trio.lowlevel.checkpoint()
        return self.stream


@asynccontextmanager
async def opened(link: PackLink) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.keep_open)
        await trio.testing.wait_all_tasks_blocked()
        assert link.is_open
        yield
        nursery.cancel_scope.cancel()


async def test_what_cannot_leave_any_more_is_told_of_and_nothing_is_added_then() -> None:
    stream = Stream()
    link = PackLink(Near(stream), "next", RingMeter())  # type: ignore[arg-type]
    left: list[AzuError | None] = []
    async with opened(link):
        assert stream.is_urgent
        stream.end.set()
        await trio.lowlevel.checkpoint()
        link.add(Entry(b"j" * 16, 0, 9, token=1), left.append)
        link.add(Entry(b"j" * 16, 0, 9, token=1), left.append)
        await trio.testing.wait_all_tasks_blocked()
        assert not link.is_open
    assert len(left) == 2
    assert all(error is None for error in left) or all(isinstance(error, NetworkError) for error in left)


async def test_where_the_peer_is_lost_everybody_who_waits_is_told_and_nobody_where_this_end_gives_up() -> None:
    stream, left = Stream(), list[AzuError | None]()
    link = PackLink(Near(stream), "next", RingMeter())  # type: ignore[arg-type]
    async with opened(link):
        link.add(Entry(b"j" * 16, 0, 9, token=1), left.append)
    assert left == []
    lost = stream.error = NetworkError("gone")
    link = PackLink(Near(stream), "next", RingMeter())  # type: ignore[arg-type]
    async with opened(link):
        for token in (1, 2):
            link.add(Entry(b"j" * 16, 0, 9, token=token), left.append)
        await trio.testing.wait_all_tasks_blocked()
        assert not link.is_open
    assert left == [lost, lost]


async def test_one_stream_serves_all_who_hold_it_and_is_closed_some_time_after(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    opened: list[Stream] = []

    class Counting:
        async def open_stream(self, *_: object) -> Stream:
            opened.append(Stream())
            return opened[-1]

    subject = Packs(Counting())  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(subject.run)
        for _ in range(2):
            with subject.held("next") as one, subject.held("next") as other:
                await trio.sleep(10 * packs._LINGER_S)
                assert one is other
                assert one.is_open
            await trio.sleep(packs._LINGER_S / 2)
            with subject.held("next") as third:
                assert third is one
            await trio.sleep(2 * packs._LINGER_S)
            assert not one.is_open
        nursery.cancel_scope.cancel()
    assert len(opened) == 2


async def until_counted(overlay: Overlay, peer_id: str) -> None:
    with trio.fail_after(LIMIT):
        while overlay.statistics().violations != {peer_id: 1}:
            await trio.sleep(0.005)


async def test_a_receiver_that_answers_is_counted_and_left() -> None:
    async def talk(stream: OverlayStream) -> None:
        await Channel(stream, PACK).send(Nexts(jobs=((b"j" * 16, 0, 2, 1),)))
        await trio.sleep_forever()

    async with peer(1) as sender, peer(2) as receiver, trio.open_nursery() as nursery:
        receiver.handle(PACK_PROTOCOL, talk)
        await sender.connect(receiver.peer_id, receiver.addrs)
        link = PackLink(sender, receiver.peer_id, RingMeter())
        nursery.start_soon(link.keep_open)
        await until_counted(sender, receiver.peer_id)
        assert not link.is_open
        nursery.cancel_scope.cancel()
