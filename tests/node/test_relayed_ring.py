"""Rings that begin on a relay: all real, on loopback. They move to a direct connection once there is one, and nothing
is lost, doubled or out of order. Where that fails they stay, and the job does not notice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.errors import AzuError, NetworkError
from azu.overlay import Overlay, OverlayConfig, OverlayStream, Reach, RelayLimits, open_overlay
from azu.overlay.nat import circuits, reachability
from azu.wire.messages import RING, RING_PROTOCOL, Chunk, Credit, Hello, Moved, Next, Refused
from azu.wire.tensors import TensorHeader
from node import ring
from node.engine.stage import Step
from node.intake import Intake
from node.leg import Leg
from node.packs import Packs
from node.ring import GRANT, WINDOW, RingLink
from tests.node.real_stages import (
    LIMIT,
    Coordinator,
    Stage,
    TinyModel,
    identity,
    peer,
    prompt_of,
    real_stage,
    tiny_model,
)
from tests.overlay.conftest import LOOPBACK
from tests.overlay.nat.corners import corners, relaying, reserve, until

HELLO = Hello(job_id=b"j" * 16, epoch=0, stage=1)
WIDTH = 256


async def connect_directly(source: Overlay, target: Overlay) -> None:
    assert not source.is_direct(target.peer_id)
    await source._traversal._dials.connect(target.peer_id, target.own_addresses[0])


Odd = Callable[[OverlayStream], Awaitable[None]]


@dataclass
class Relayed:
    """A link, and the next stage that takes what it sends: `takes` is how many chunks it has time for."""

    hub: Overlay
    source: Overlay
    target: Overlay
    link: RingLink
    intake: Intake
    odd: list[Odd]  # what becomes of the streams after the first, until it is used up
    takes: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(0))
    positions: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)  # of each of them
    error: AzuError | None = None

    async def run(self) -> None:
        try:
            await self.link.run(trio.lowlevel.checkpoint)
        except AzuError as error:
            self.error = error

    async def serve(self, stream: OverlayStream) -> None:
        """As a worker does, but for the computation."""
        channel = Channel(stream, RING)
        hello, _ = await channel.expect(Hello)
        if hello.part and self.odd:
            await self.odd.pop(0)(stream)
            return
        part = self.intake.admit(channel, hello)
        with part.scope:
            await part.its_turn()
            while (received := await channel.receive()) is not None:
                message, body = received
                if isinstance(message, Moved):
                    await self.intake.follow(message)
                    return
                assert isinstance(message, Chunk)
                assert body == bytes([message.position % 256]) * 4 * WIDTH
                await self.take(message, part.number)

    async def take(self, chunk: Chunk, part: int) -> None:
        await self.takes.acquire()
        self.positions.append(chunk.position)
        self.parts.append(part)
        if len(self.positions) % GRANT == 0 and self.intake.channel is not None:
            await self.intake.channel.send(Credit(frames=GRANT))

    async def send(self, start: int, end: int) -> None:
        tensor = TensorHeader(dtype="float32", shape=(1, WIDTH))
        for position in range(start, end):
            chunk = Chunk(position=position, tensor=tensor, sample=False)
            await self.link.send_chunk(chunk, bytes([position % 256]) * 4 * WIDTH)

    async def taken(self, count: int) -> None:
        """Have the next stage take so many chunks more, and wait until it has."""
        wanted = len(self.positions) + count
        for _ in range(count):
            self.takes.release()
        await until(lambda: len(self.positions) >= wanted)

    @property
    def carried(self) -> int:
        return relaying(self.hub).carried


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "_POLL_S", 0.02)
    monkeypatch.setattr(circuits, "_IDLE_SECONDS", 0.05)


@asynccontextmanager
async def relayed(*odd: Odd) -> AsyncIterator[Relayed]:
    async with corners(listen=LOOPBACK) as (hub, target, source), trio.open_nursery() as nursery:
        await source.connect(target.peer_id, await reserve(target, hub))
        link = RingLink(source, target.peer_id, HELLO, Packs(source))
        intake = Intake(HELLO, source.peer_id, 4 * WIDTH)
        pair = Relayed(hub, source, target, link, intake, list(odd))
        target.handle(RING_PROTOCOL, pair.serve)
        nursery.start_soon(pair.run)
        yield pair
        nursery.cancel_scope.cancel()


async def test_a_ring_leaves_its_relay_and_nothing_is_lost_doubled_or_overtaken() -> None:
    async with relayed() as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.send, 0, 300)
        await pair.taken(50)
        await until(lambda: pair.link._credits.value == 0)  # it moves all the same
        assert pair.carried > 50 * 4 * WIDTH
        await connect_directly(pair.source, pair.target)
        await until(lambda: pair.link._next is not None)
        await pair.taken(2 * WINDOW)  # at least what is under way on the first stream
        await until(lambda: relaying(pair.hub).circuits == 0)  # nobody uses it any more
        carried, moved_at = pair.carried, len(pair.positions)
        await pair.taken(300 - moved_at)
        assert pair.carried == carried
        assert pair.positions == list(range(300))
        assert pair.parts == sorted(pair.parts)
        assert pair.parts[49] == 0
        assert pair.parts[-1] == 1
    # All credit has come back, whichever way it took: four chunks are between two grants at most.
    assert pair.link._credits.value >= WINDOW - GRANT
    assert pair.error is None
    assert pair.source.statistics().violations == pair.target.statistics().violations == {}


async def refuse(stream: OverlayStream) -> None:
    await Channel(stream, RING).send(Refused(code="not_now", message="no"))


async def reset(stream: OverlayStream) -> None:
    await stream.reset()


async def nonsense(stream: OverlayStream) -> None:
    await Channel(stream, RING).send(Credit(frames=1))


async def silence(stream: OverlayStream) -> None:
    await stream.receive_some()


async def test_where_a_direct_stream_fails_the_ring_stays_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_WELCOME_S", 0.3)
    monkeypatch.setattr(ring, "_RETRY_S", 0.05)
    deeds = (refuse, reset, nonsense, silence)
    async with relayed(*deeds) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.send, 0, 100)
        await pair.taken(10)
        await connect_directly(pair.source, pair.target)
        for left in reversed(range(len(deeds))):
            await until(lambda left=left: len(pair.odd) <= left)
            await pair.taken(5)
        await until(lambda: pair.link._next is not None)  # the fifth is welcome
        await pair.taken(100 - len(pair.positions))
        assert pair.positions == list(range(100))
        assert (pair.parts[0], pair.parts[-1]) == (0, len(deeds) + 1)
        assert pair.source.statistics().violations == {pair.target.peer_id: 1}  # the nonsense
        assert pair.error is None


async def test_a_relay_that_is_lost_while_the_ring_leaves_it_ends_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    gone_over = trio.Event()

    async def say_nothing(self: Intake, moved: Moved) -> None:
        gone_over.set()
        await trio.sleep_forever()

    monkeypatch.setattr(Intake, "follow", say_nothing)
    async with relayed() as pair:
        await connect_directly(pair.source, pair.target)
        await gone_over.wait()
        with trio.move_on_after(0.1) as waiting:
            await pair.send(0, 1)
        assert waiting.cancelled_caught, "it was sent before the receiver had followed"
        await pair.source.disconnect(pair.hub.peer_id)
        await until(lambda: pair.error is not None)
        assert isinstance(pair.error, NetworkError)
        assert pair.source.is_direct(pair.target.peer_id)


async def test_a_ring_that_is_direct_from_the_start_has_no_second_stream() -> None:
    async with corners(others=1) as (target, source), trio.open_nursery() as nursery:
        opened: list[OverlayStream] = []

        async def take(stream: OverlayStream) -> None:
            opened.append(stream)
            await trio.sleep_forever()

        target.handle(RING_PROTOCOL, take)
        link = RingLink(source, target.peer_id, HELLO, Packs(source))
        nursery.start_soon(link.run, trio.lowlevel.checkpoint)
        await link.send_next(Next(index=0, token=1))
        [task] = [each for each in nursery.child_tasks if each.name.endswith("RingLink.run")]
        assert not task.child_nurseries
        assert not opened[0].is_relayed
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def relayed_stages(model: TinyModel) -> AsyncIterator[tuple[Overlay, Coordinator]]:
    """A relay, and a coordinator of two stages that are connected through it only."""
    config = OverlayConfig(identity(98).seed, LOOPBACK, relay=RelayLimits())
    with trio.fail_after(LIMIT):
        async with (
            open_overlay(config) as hub,
            real_stage(model, 1, 0, 2) as first,
            real_stage(model, 2, 2, 4) as last,
            peer(99) as me,
        ):
            stages: list[Stage] = [first, last]
            for stage in stages:
                await me.connect(stage.peer_id, stage.overlay.addrs)
                await stage.overlay.connect(hub.peer_id, hub.addrs)
                while stage.overlay.finding.reach != Reach.LOCAL:  # which lets go of all reservations
                    await trio.sleep(0.02)
            await first.overlay.connect(last.peer_id, await reserve(last.overlay, hub))
            yield hub, Coordinator(identity(99), me, stages, model.manifest.digest)


async def test_a_job_that_begins_on_a_relay_ends_without_it(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, count = prompt_of(1_300), 120  # six chunks, and many steps
    unrelayed, run = trio.Event(), Leg._run

    async def wait_half_way(self: Leg, step: Step, *then: Any) -> None:
        if step.job.position >= len(prompt) + count // 2:
            await unrelayed.wait()
        await run(self, step, *then)

    monkeypatch.setattr(Leg, "_run", wait_half_way)
    async with relayed_stages(model) as (hub, coordinator), trio.open_nursery() as nursery:
        first, last = coordinator.stages
        answers: list[list[int]] = []

        async def ask() -> None:
            end = await coordinator.answer(coordinator.ticket(len(prompt), count), prompt)
            assert (end.finish, end.failures) == ("length", [])
            answers.append(end.tokens)

        nursery.start_soon(ask)
        await until(lambda: relaying(hub).carried > len(prompt) * 32 * 4)  # the prompt has passed
        await connect_directly(first.overlay, last.overlay)
        await until(lambda: relaying(hub).circuits == 0)  # both ways have left it
        unrelayed.set()
        carried = relaying(hub).carried
        await until(lambda: answers)
        assert relaying(hub).carried == carried
        assert answers == [model.greedy(prompt, count)]
        for stage in coordinator.stages:
            await stage.until_idle()
            assert stage.overlay.statistics().violations == {}
