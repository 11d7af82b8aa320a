"""The sending end of a ring: never more under way than was granted, and every odd answer ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio
import trio.testing

from azu.channel import Channel, RefusedError
from azu.errors import AzuError, NetworkError, ProtocolError
from azu.wire.messages import RING, Chunk, Credit, Hello, Message, Moved, Next, Ping, Refused, Welcome
from azu.wire.tensors import TensorHeader
from node import ring
from node.packs import Packs
from node.ring import GRANT, WINDOW, RingLink
from tests.test_channel import StreamTwin, streams

HELLO = Hello(job_id=b"j" * 16, epoch=0, stage=1)
BODY = bytes(8)
LIMIT = 60.0  # seconds; only keeps a hung test from hanging the run


def chunk(position: int) -> Chunk:
    return Chunk(position=position, tensor=TensorHeader(dtype="float16", shape=(1, 4)), sample=False)


@dataclass
class Far:
    """The link and what its next stage sees of it."""

    link: RingLink
    channel: Channel
    stream: StreamTwin
    error: AzuError | None = None


Opened = Callable[[], object]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Opened:
    near_end, far_end = streams()

    async def open_twin(*_: object) -> StreamTwin:
        return near_end

    monkeypatch.setattr(ring, "open_worker_stream", open_twin)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Far]:
        link = RingLink(None, "next", HELLO, Packs(None))  # type: ignore[arg-type]
        seen = Far(link, Channel(far_end, RING), far_end)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_run, seen)
                assert await seen.channel.expect(Hello) == (HELLO, bytearray())
                yield seen
                nursery.cancel_scope.cancel()

    return opened


async def _run(far: Far) -> None:
    try:
        await far.link.run(trio.lowlevel.checkpoint)
    except AzuError as error:
        far.error = error


async def send_many(link: RingLink, count: int) -> None:
    for position in range(count):
        await link.send_chunk(chunk(position), BODY)


async def received(channel: Channel) -> int:
    """How many chunks have come."""
    count = 0
    with trio.move_on_after(0.05):
        while await channel.receive() is not None:
            count += 1
    return count


async def test_no_more_is_under_way_than_the_window(far: Opened) -> None:
    async with far() as next_stage, trio.open_nursery() as nursery:  # type: ignore[attr-defined]
        nursery.start_soon(send_many, next_stage.link, 3 * WINDOW)
        assert await received(next_stage.channel) == WINDOW
        await next_stage.channel.send(Credit(frames=GRANT))
        assert await received(next_stage.channel) == GRANT
        await next_stage.channel.send(Credit(frames=1))
        assert await received(next_stage.channel) == 1
        nursery.cancel_scope.cancel()


async def test_tokens_need_no_credit(far: Opened) -> None:
    async with far() as next_stage:  # type: ignore[attr-defined]
        await send_many(next_stage.link, WINDOW)
        await next_stage.link.send_next(Next(index=0, token=1))
        assert await received(next_stage.channel) == WINDOW + 1


async def test_what_is_sent_before_the_link_is_open_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    near_end, far_end = streams()
    dialled = trio.Event()

    async def open_late(*_: object) -> StreamTwin:
        await dialled.wait()
        return near_end

    monkeypatch.setattr(ring, "open_worker_stream", open_late)
    link = RingLink(None, "next", HELLO, Packs(None))  # type: ignore[arg-type]
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(link.run, trio.lowlevel.checkpoint))
            nursery.start_soon(link.send_chunk, chunk(0), BODY)
            await trio.testing.wait_all_tasks_blocked()
            dialled.set()
            channel = Channel(far_end, RING)
            assert await channel.receive() == (HELLO, bytearray())
            assert await channel.receive() == (chunk(0), bytearray(BODY))
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (Credit(frames=1), ProtocolError, "bad_credit"),  # nothing was sent yet
        (Credit(frames=1_024), ProtocolError, "bad_credit"),
        (Next(index=0, token=1), ProtocolError, "bad_credit"),
        (Moved(part=1), ProtocolError, "bad_credit"),  # nobody asked it to
        (Welcome(), ProtocolError, "bad_credit"),
        (Ping(), ProtocolError, "bad_message"),
        (Refused(code="unknown_job", message="no ticket"), RefusedError, "unknown_job"),
        (None, NetworkError, "stage_lost"),
    ],
)
async def test_other_answers_end_the_link(far: Opened, answer: Message | None, kind: type[AzuError], code: str) -> None:
    async with far() as next_stage:  # type: ignore[attr-defined]
        if answer is None:
            await next_stage.stream.aclose()
        else:
            await next_stage.channel.send(answer)
        while next_stage.error is None:
            await trio.sleep(0.001)
        assert isinstance(next_stage.error, kind)
        assert next_stage.error.code == code


async def test_credit_for_more_than_was_sent_is_refused(far: Opened) -> None:
    async with far() as next_stage:  # type: ignore[attr-defined]
        await send_many(next_stage.link, 2)
        await next_stage.channel.send(Credit(frames=3))
        while next_stage.error is None:
            await trio.sleep(0.001)
        assert next_stage.error.code == "bad_credit"


async def test_the_link_closes_its_stream_when_cancelled(far: Opened) -> None:
    async with far() as next_stage:  # type: ignore[attr-defined]
        pass
    with trio.fail_after(LIMIT):
        assert await next_stage.channel.receive() is None
