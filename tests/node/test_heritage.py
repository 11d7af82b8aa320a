"""A stage that is to get another worker's KV cache: from whom it takes it, what it refuses, and what it has then."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import trio

from azu.channel import Channel
from azu.overlay import Overlay, OverlayStream
from azu.tickets import JobTicket, Sampling, sign_ticket
from azu.wire.messages import RING, RING_PROTOCOL, Amend, Hello, Inheritance, Inherited, Kept, Message, Paused
from node.engine.heritage import Piece, pieces
from node.engine.stage import JobState, Step
from tests.node.real_stages import LIMIT, Coordinator, Stage, TinyModel, identity, peer, real_stage, tiny_model

FIRST, HEIR, LAST, LEAVER, COORDINATOR = 1, 2, 3, 4, 99
ROWS = 20
M = TypeVar("M", bound=Message)
SIZE = 2 * 2 * 8 * 4  # bytes that a layer keeps of a position: keys and values, 2 heads of 8 numbers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass
class Scene:
    """The heir's job, opened and not begun."""

    heir: Stage
    coordinator: Coordinator
    channel: Channel
    ticket: JobTicket
    leaver: Overlay
    first: Overlay

    @asynccontextmanager
    async def bequest(self, sender: Overlay | None = None) -> AsyncIterator[Channel]:
        """A ring stream to the heir, greeted."""
        async with await (sender or self.leaver).open_stream(self.heir.peer_id, RING_PROTOCOL) as stream:
            channel = Channel(stream, RING)
            await channel.send(Hello(job_id=self.ticket.job_id, epoch=1, stage=1))
            yield channel

    async def inherited(self) -> int:
        return (await until(self.channel, Inherited)).positions

    async def paused(self) -> Paused:
        """After an amendment; as it is told for the heir's own ticket first."""
        amended = self.ticket.amended({}, self.ticket.issued_at, {1: 9})
        await self.channel.send(Amend(known=0), sign_ticket(self.coordinator.identity, amended))
        while (paused := await until(self.channel, Paused)).epoch < amended.epoch:
            pass
        return paused


async def until(channel: Channel, kind: type[M]) -> M:
    """The next message of that kind."""
    while (received := await channel.receive()) is not None:
        if isinstance(received[0], kind):
            return received[0]
    raise AssertionError("the job has ended")


@asynccontextmanager
async def scene_of(model: TinyModel) -> AsyncIterator[Scene]:
    async def take(stream: OverlayStream) -> None:
        await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        async with (
            real_stage(model, HEIR, 1, 3) as heir,
            peer(FIRST) as first,
            peer(LAST) as last,
            peer(LEAVER) as leaver,
            peer(COORDINATOR) as me,
        ):
            last.handle(RING_PROTOCOL, take)
            for overlay in (first, leaver, me):
                await overlay.connect(heir.peer_id, heir.overlay.addrs)
            await heir.overlay.connect(last.peer_id, last.addrs)
            coordinator = Coordinator(identity(COORDINATOR), me, [heir], model.manifest.digest)
            ends = [(identity(FIRST), 0, 1), (identity(LEAVER), 1, 3), (identity(LAST), 3, 4)]
            stages = [{"peer_id": each.peer_id, "start": start, "end": end} for each, start, end in ends]
            ticket = coordinator.ticket(100, 50, stages=stages).bequest({1: heir.peer_id}, 1, int(time.time()))
            async with coordinator.opened(ticket) as channel:
                yield Scene(heir, coordinator, channel, ticket, leaver, first)


def left(model: TinyModel) -> JobState:
    """What the leaver has."""
    stage = model.stage(1, 3)
    job = stage.open_job(Sampling(), (), ROWS)
    stage.run_steps([Step(job, bytearray(ROWS * 32 * 4), ROWS, False)])[0].unwrap()
    return job


def sent(job: JobState) -> list[tuple[Kept, bytes]]:
    form = job.stage.cache_form()
    assert form is not None
    return [(_kept(piece), bytes(job.stage.read_piece(job, piece))) for piece in pieces(form, ROWS)]


def _kept(piece: Piece) -> Kept:
    return Kept(layer=piece.layer, position=piece.position, rows=piece.rows)


async def test_an_heir_has_what_it_was_left(model: TinyModel) -> None:
    async with scene_of(model) as scene:
        job = left(model)
        async with scene.bequest() as channel:
            await channel.send(Inheritance(positions=ROWS))
            for kept, body in sent(job):
                await channel.send(kept, body)
            assert await channel.receive() is None
        assert await scene.inherited() == ROWS
        paused = await scene.paused()
        assert (paused.position, paused.can_replay, paused.replay_from) == (ROWS, True, ROWS)


async def test_an_amendment_ends_what_is_under_way(model: TinyModel) -> None:
    async with scene_of(model) as scene, scene.bequest() as channel:
        await channel.send(Inheritance(positions=ROWS))
        kept, body = sent(left(model))[0]
        await channel.send(kept, body)
        assert (await scene.paused()).position == 0
        assert await channel.receive() is None


async def test_nobody_else_can_leave_it_anything(model: TinyModel) -> None:
    async with scene_of(model) as scene:
        async with scene.bequest(scene.first) as channel:
            assert await channel.receive() is None
        assert scene.heir.overlay.statistics().violations == {scene.first.peer_id: 1}
        async with scene.bequest() as one:
            await one.send(Inheritance(positions=ROWS))
            async with scene.bequest() as other:  # nor does it take two
                assert await other.receive() is None


@pytest.mark.parametrize(
    "message",
    [
        Inheritance(positions=0),
        Inheritance(positions=150),
        Inheritance(positions=2**20),
        Kept(layer=0, position=0, rows=1),
        Hello(job_id=bytes(16), epoch=1, stage=1),
    ],
)
async def test_a_beginning_that_makes_no_sense(model: TinyModel, message: Message) -> None:
    async with scene_of(model) as scene:
        async with scene.bequest() as channel:
            await channel.send(message)
            assert await channel.receive() is None
        assert await scene.inherited() == 0
        assert scene.heir.overlay.statistics().violations == {scene.leaver.peer_id: 1}
        assert (await scene.paused()).position == 0


@pytest.mark.parametrize(
    ("kept", "size"),
    [
        (Kept(layer=0, position=0, rows=ROWS), ROWS * SIZE - 1),
        (Kept(layer=0, position=0, rows=ROWS), ROWS * SIZE + 1),
        (Kept(layer=0, position=0, rows=ROWS - 1), (ROWS - 1) * SIZE),
        (Kept(layer=0, position=1, rows=ROWS), ROWS * SIZE),
        (Kept(layer=1, position=0, rows=ROWS), ROWS * SIZE),
        (Kept(layer=7, position=0, rows=ROWS), ROWS * SIZE),
    ],
)
async def test_pieces_that_are_none(model: TinyModel, kept: Kept, size: int) -> None:
    async with scene_of(model) as scene:
        async with scene.bequest() as channel:
            await channel.send(Inheritance(positions=ROWS))
            await channel.send(kept, bytes(size))
            assert await channel.receive() is None
        assert await scene.inherited() == 0
        assert scene.heir.overlay.statistics().violations == {scene.leaver.peer_id: 1}
        assert (await scene.paused()).position == 0


async def test_one_that_breaks_off_leaves_nothing(model: TinyModel) -> None:
    async with scene_of(model) as scene:
        async with scene.bequest() as channel:
            await channel.send(Inheritance(positions=ROWS))
            kept, body = sent(left(model))[0]
            await channel.send(kept, body)
        assert await scene.inherited() == 0
        assert scene.heir.overlay.statistics().violations == {}
        assert (await scene.paused()).position == 0
