"""A ring that moves from one stream to another, at its receiving end: the middle stage of three between neighbours that
the test plays. What is not in order costs its sender the stream or the job, and nobody else anything.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from azu.channel import Channel
from azu.errors import NetworkError
from azu.overlay import Overlay
from azu.wire.messages import MAX_PART, RING, RING_PROTOCOL, Chunk, Credit, Hello, Moved, Welcome
from node.intake import Intake
from tests.node.real_stages import TinyModel, identity, tiny_model
from tests.node.test_hostile_neighbours import FIRST, LAST, ROWS, Middle, chunk, middle
from tests.test_channel import streams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def opened(ring: Middle, overlay: Overlay | None = None, **changes: Any) -> Channel:
    """Another ring stream to the stage, with what it says first."""
    stream = await (overlay or ring.first).open_stream(ring.stage.peer_id, RING_PROTOCOL)
    channel = Channel(stream, RING)
    fields = {"t": "hello", "job_id": ring.job_id, "epoch": 0, "stage": 0, "part": 1} | changes
    await channel.send(Hello.model_construct(**fields))
    return channel


async def offered(ring: Middle, part: int = 1) -> Channel:
    """A stream to which the stage is ready to follow."""
    channel = await opened(ring, part=part)
    assert await channel.expect(Welcome) == (Welcome(), bytearray())
    return channel


async def send(channel: Channel, number: int) -> None:
    await channel.send(chunk(number * ROWS), bytes(ROWS * 32 * 4))


async def passed_on(ring: Middle, *numbers: int) -> None:
    """The stage passes on these chunks, and in this order."""
    for number in numbers:
        message, _ = await ring.following.expect(Chunk)
        assert message.position == number * ROWS


async def ended(channel: Channel) -> bool:
    """Whether nothing but the end comes."""
    return await channel.receive() is None


async def test_a_ring_goes_on_in_the_stream_that_it_moves_to_and_so_does_its_credit(model: TinyModel) -> None:
    async with middle(model) as ring:
        for number in range(5):
            await send(ring.previous, number)
        await passed_on(ring, *range(5))
        second = await offered(ring)
        await send(second, 5)  # not read before the first has ended
        await ring.previous.send(Moved(part=1))
        await ring.previous.expect(Credit)
        assert await ring.previous.expect(Moved) == (Moved(part=1), bytearray())
        assert await ended(ring.previous)
        for number in (6, 7):
            await send(second, number)
        await passed_on(ring, 5, 6, 7)
        await second.expect(Credit)
        third = await offered(ring, part=2)
        await second.send(Moved(part=2))
        await send(third, 8)
        assert await second.expect(Moved) == (Moved(part=2), bytearray())
        await ring.following.send(Credit(frames=4))
        await passed_on(ring, 8)
        assert await ring.end() == []
        assert await ended(third)
    assert ring.stage.overlay.statistics().violations == {}


async def test_a_held_stream_is_not_read_before_the_one_in_use_has_moved(model: TinyModel) -> None:
    async with middle(model) as ring:
        second = await offered(ring)
        await second.stream.send_all(b"\xff" * 100_000)
        for number in range(3):
            await send(ring.previous, number)
        await passed_on(ring, 0, 1, 2)
        await second.stream.reset()
        assert await ring.end() == []
    assert ring.stage.overlay.statistics().violations == {}


async def test_a_newer_stream_takes_the_place_of_one_that_its_sender_has_given_up(model: TinyModel) -> None:
    async with middle(model) as ring:
        given_up = await offered(ring)
        second = await offered(ring, part=2)
        assert await ended(given_up)
        await ring.previous.send(Moved(part=2))
        await send(second, 0)
        await passed_on(ring, 0)
        assert await ring.end() == []


# What a third stream may say while a second is held, none of which is in order: of the previous stage.
WRONG = ({"stage": 1}, {"part": 0}, {"part": 1}, {"part": MAX_PART + 1})  # a fifth would ban it


async def test_a_stream_that_may_not_take_over_is_cut_off_alone(model: TinyModel) -> None:
    async with middle(model) as ring:
        second = await offered(ring)
        for changes in WRONG:
            assert await ended(await opened(ring, **{"part": 2} | changes)), changes
        assert await ended(await opened(ring, ring.last, part=2))
        violations = {identity(FIRST).peer_id: len(WRONG), identity(LAST).peer_id: 1}
        assert ring.stage.overlay.statistics().violations == violations
        await send(ring.previous, 0)
        await ring.previous.send(Moved(part=1))
        await send(second, 1)
        await passed_on(ring, 0, 1)
        assert await ring.end() == []


@pytest.mark.parametrize(("held", "named"), [(None, 1), (1, 2)])
async def test_a_move_to_where_nothing_is_held_ends_the_job(model: TinyModel, held: int | None, named: int) -> None:
    async with middle(model) as ring:
        if held is not None:
            await offered(ring, held)
        await ring.previous.send(Moved(part=named))
        failed = await ring.failure()
        assert (failed.peer_id, failed.code) == (identity(FIRST).peer_id, "bad_part")
        assert ring.stage.overlay.statistics().violations == {identity(FIRST).peer_id: 1}
        assert await ring.end() == []


async def test_a_stream_that_ends_without_a_move_ends_the_job_whatever_is_held(model: TinyModel) -> None:
    async with middle(model) as ring:
        await offered(ring)
        await send(ring.previous, 0)
        await ring.previous.stream.aclose()
        failed = await ring.failure()
        assert (failed.peer_id, failed.code) == (identity(FIRST).peer_id, "stage_lost")
        assert await ring.end() == []


async def test_what_comes_after_the_move_on_the_old_stream_is_nothing(model: TinyModel) -> None:
    async with middle(model) as ring:
        second = await offered(ring)
        await ring.previous.send(Moved(part=1))
        await send(second, 0)
        await passed_on(ring, 0)
        for message in (Moved(part=1), Credit(frames=1)):
            with suppress(NetworkError):  # the stage has closed it
                await ring.previous.send(message)
        await send(second, 1)
        await passed_on(ring, 1)
        assert await ring.end() == []


async def test_streams_that_are_held_end_with_the_job(model: TinyModel) -> None:
    async with middle(model) as ring:
        second = await offered(ring)
        assert await ring.end() == []
        assert await ended(second)


async def test_the_second_stream_may_be_here_before_the_first_which_comes_by_relay() -> None:
    hello = Hello(job_id=b"j" * 16, epoch=0, stage=0)
    (_, near), (_, second) = streams(), streams()
    intake = Intake(hello, near.peer_id, 64)
    held = intake.admit(Channel(second, RING), hello.model_copy(update={"part": 1}))
    assert intake.channel is None
    first = intake.admit(Channel(near, RING), hello)
    assert intake.channel is first.channel
    await intake.follow(Moved(part=1))
    assert intake.channel is held.channel
    assert held.due.is_set()


async def test_a_stream_that_comes_when_the_job_is_over_is_not_read() -> None:
    hello = Hello(job_id=b"j" * 16, epoch=0, stage=0)
    _, near = streams()
    intake = Intake(hello, near.peer_id, 64)
    intake.close()
    assert intake.admit(Channel(near, RING), hello).scope.cancel_called
