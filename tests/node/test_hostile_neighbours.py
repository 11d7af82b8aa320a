"""The middle stage of three between neighbours that the test plays: whatever they do ends that job alone, at once, and
the coordinator hears once whose fault it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio

from azu.channel import Channel
from azu.errors import NetworkError
from azu.overlay import Overlay, OverlayStream
from azu.wire.messages import RING, RING_PROTOCOL, Chunk, Credit, End, Failed, Hello, Message, Next, ReceiptReply
from azu.wire.tensors import TensorHeader
from tests.node.real_stages import (
    LIMIT,
    Coordinator,
    Stage,
    TinyModel,
    identity,
    next_of,
    peer,
    real_stage,
    tiny_model,
)

ROWS = 256
CHUNKS = 20
PROMPT = CHUNKS * ROWS
FIRST, MIDDLE, LAST, COORDINATOR = 1, 2, 3, 99


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def chunk(position: int, rows: int = ROWS, width: int = 32, **changes: object) -> Chunk:
    fields = {"position": position, "tensor": TensorHeader(dtype="float32", shape=(rows, width)), "sample": False}
    return Chunk.model_validate(fields | changes)


@dataclass
class Middle:
    """A real stage with a job, and what the test holds of it."""

    stage: Stage
    job_id: bytes
    coordinator: Channel
    previous: Channel  # towards the stage
    following: Channel  # from the stage; its Hello has been read
    first: Overlay  # whose ring stream `previous` is
    last: Overlay

    async def send(self, position: int, rows: int = ROWS) -> None:
        await self.previous.send(chunk(position, rows), bytes(rows * 32 * 4))

    async def failure(self) -> Failed:
        failed = await next_of(self.coordinator, Failed)
        assert isinstance(failed, Failed)
        return failed

    async def end(self) -> list[Message]:
        """End the job; what came of it before the receipt, without signs of life."""
        await self.coordinator.send(End())
        seen: list[Message] = []
        with trio.fail_after(60):
            while (received := await self.coordinator.receive()) is not None:
                if isinstance(received[0], ReceiptReply):
                    break
                if isinstance(received[0], Failed):
                    seen.append(received[0])
            else:
                pytest.fail("no receipt came")
        self.stage.assert_idle()
        return seen


@dataclass
class Neighbours:
    first: Overlay
    last: Overlay
    arrived: list[Channel] = field(default_factory=list)

    async def take(self, stream: OverlayStream) -> None:
        self.arrived.append(Channel(stream, RING))
        await trio.sleep_forever()


@asynccontextmanager
async def middle(model: TinyModel, prompt_tokens: int = PROMPT) -> AsyncIterator[Middle]:
    with trio.fail_after(LIMIT):
        async with (
            real_stage(model, MIDDLE, 1, 3) as stage,
            peer(FIRST) as first,
            peer(LAST) as last,
            peer(COORDINATOR) as me,
        ):
            neighbours = Neighbours(first, last)
            last.handle(RING_PROTOCOL, neighbours.take)
            for overlay in (first, last, me):
                await overlay.connect(stage.peer_id, stage.overlay.addrs)
            await stage.overlay.connect(last.peer_id, last.addrs)
            coordinator = Coordinator(identity(COORDINATOR), me, [stage], model.manifest.digest)
            ends = [(identity(FIRST).peer_id, 0, 1), (stage.peer_id, 1, 3), (identity(LAST).peer_id, 3, 4)]
            stages = [{"peer_id": peer_id, "start": start, "end": end} for peer_id, start, end in ends]
            ticket = coordinator.ticket(prompt_tokens, 20, stages=stages)
            async with (
                coordinator.opened(ticket) as job,
                await first.open_stream(stage.peer_id, RING_PROTOCOL) as to_stage,
            ):
                previous = Channel(to_stage, RING)
                await previous.send(Hello(job_id=ticket.job_id, epoch=0, stage=0))
                while not neighbours.arrived:
                    await trio.sleep(0.005)
                await neighbours.arrived[0].expect(Hello)
                yield Middle(stage, ticket.job_id, job, previous, neighbours.arrived[0], first, last)
            await stage.until_idle()


async def test_an_honest_ring_runs_on_credit(model: TinyModel) -> None:
    async with middle(model) as ring:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def take_credit() -> None:
                await ring.previous.expect(Credit)
                await ring.previous.expect(Credit)

            for number in range(8):
                await ring.send(number * ROWS)
                await ring.following.expect(Chunk)
        assert await ring.end() == []


async def test_credit_for_single_rows_comes_less_often_and_before_there_is_none(model: TinyModel) -> None:
    """Of decoded tokens one is under way at a time; whatever was sent before them counts with them."""
    async with middle(model) as ring:
        position, granted = 0, list[int]()
        for sizes in ([1] * 7, [ROWS] * 4, [ROWS, ROWS, *[1] * 5], [*[1] * 5, ROWS]):
            for rows in sizes:
                await ring.send(position, rows)
                await ring.following.expect(Chunk)
                await ring.following.send(Credit(frames=1))
                position += rows
            credit, _ = await ring.previous.expect(Credit)
            granted.append(credit.frames)
        assert granted == [7, 4, 7, 6]
        assert await ring.end() == []


Deed = Callable[[Middle], Awaitable[None]]


async def garbage(ring: Middle) -> None:
    await ring.previous.stream.send_all(b"\xff" * 64)


async def wrong_position(ring: Middle) -> None:
    await ring.send(ROWS)


async def repeated_position(ring: Middle) -> None:
    await ring.send(0)
    await ring.send(0)


async def wrong_width(ring: Middle) -> None:
    await ring.previous.send(chunk(0, width=16), bytes(ROWS * 16 * 4))


async def wrong_dtype(ring: Middle) -> None:
    tensor = TensorHeader(dtype="float16", shape=(ROWS, 32))
    await ring.previous.send(chunk(0, tensor=tensor), bytes(ROWS * 32 * 2))


async def too_large(ring: Middle) -> None:
    await ring.send(0, ROWS + 1)


async def samples_too_soon(ring: Middle) -> None:
    await ring.previous.send(chunk(0, sample=True), bytes(ROWS * 32 * 4))


async def second_hello(ring: Middle) -> None:
    await ring.previous.send(Hello(job_id=ring.job_id, epoch=0, stage=0))


async def token_in_the_middle(ring: Middle) -> None:
    await ring.previous.send(Next(index=0, token=1))


async def credit_from_behind(ring: Middle) -> None:
    await ring.previous.send(Credit(frames=1))


@pytest.mark.parametrize(
    "deed",
    [
        garbage, wrong_position, repeated_position, wrong_width, wrong_dtype, too_large, samples_too_soon, second_hello,
        token_in_the_middle, credit_from_behind,
    ],
)  # fmt: skip
async def test_the_previous_stage_breaks_the_protocol(model: TinyModel, deed: Deed) -> None:
    async with middle(model) as ring:
        await deed(ring)
        assert (await ring.failure()).peer_id == identity(FIRST).peer_id
        assert ring.stage.overlay.statistics().violations == {identity(FIRST).peer_id: 1}
        with trio.fail_after(60):
            while await ring.previous.receive() is not None:
                pass  # its stream was reset
        assert await ring.end() == []


async def test_the_previous_stage_sends_beyond_its_credit(model: TinyModel) -> None:
    async with middle(model) as ring:
        # The next stage gives no credit: eight go on to it, one waits to, eight fill the inbox.
        with suppress(NetworkError):  # it is cut off in the middle
            for number in range(CHUNKS):
                await ring.send(number * ROWS)
        failed = await ring.failure()
        assert (failed.peer_id, failed.code) == (identity(FIRST).peer_id, "no_credit")
        assert await ring.end() == []


@pytest.mark.parametrize("answer", [Credit(frames=1), Next(index=0, token=1), b"\xff" * 64])
async def test_the_next_stage_breaks_the_protocol(model: TinyModel, answer: Message | bytes) -> None:
    async with middle(model) as ring:
        if isinstance(answer, bytes):
            await ring.following.stream.send_all(answer)
        else:
            await ring.following.send(answer)
        assert (await ring.failure()).peer_id == identity(LAST).peer_id
        assert ring.stage.overlay.statistics().violations == {identity(LAST).peer_id: 1}
        assert await ring.end() == []


@pytest.mark.parametrize("end", ["previous", "following"])
@pytest.mark.parametrize("how", ["aclose", "reset"])
async def test_a_neighbour_leaves(model: TinyModel, end: str, how: str) -> None:
    async with middle(model) as ring:
        await ring.send(0)
        channel: Channel = getattr(ring, end)
        await getattr(channel.stream, how)()
        assert (await ring.failure()).peer_id == identity(FIRST if end == "previous" else LAST).peer_id
        assert await ring.end() == []


async def test_a_next_stage_that_neither_reads_nor_gives_credit_holds_nothing_up(model: TinyModel) -> None:
    async with middle(model) as ring:
        for number in range(9):  # eight fill its window and its stream
            await ring.send(number * ROWS)
        await trio.sleep(0.3)
        started = trio.current_time()
        assert await ring.end() == []
        assert trio.current_time() - started < 10  # what a blocked write may take is 15 s
