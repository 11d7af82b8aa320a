"""A job's tokens come on its stream and in packs beside it: in order all the same, and from its last stage only."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from azu.channel import Channel
from azu.errors import NetworkError
from azu.tickets import JobTicket
from azu.wire.messages import PACK, PACK_PROTOCOL, Nexts, Ping, Rows, Token
from azu.wire.tensors import TensorHeader
from coordinator import job as job_module
from tests.coordinator.fake_workers import COORDINATOR, LIMIT, MANIFEST, FakeWorker, honest, request, swarm_of
from tests.coordinator.test_jobs import Script


async def send_pack(worker: FakeWorker, *jobs: tuple[bytes, int, int, int], rows: Rows | None = None) -> None:
    """Say tokens beside the job stream: the job's id, epoch, index and token of each. Returns once it is ended."""
    async with await worker.overlay.open_stream(COORDINATOR.peer_id, PACK_PROTOCOL) as stream:
        channel = Channel(stream, PACK)
        if rows is None:
            await channel.send(Nexts(jobs=jobs))
        else:
            await channel.send(rows, bytes(rows.tensor.nbytes))
        await stream.send_eof()
        assert await channel.receive() is None


async def test_tokens_come_in_order_though_one_stream_is_ahead_of_the_other(tmp_path: Path) -> None:
    async def packs(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        job = ticket.job_id
        await channel.send(Token(index=0, token=7))
        await channel.send(Token(index=4, token=11, finish="length"))  # before what is under way on the other stream
        await send_pack(worker, (b"?" * 16, 0, 0, 1), (job, 1, 1, 9), (job, 0, 1, 8), (job, 0, 2, 9), (job, 0, 3, 10))
        await worker.until_end(channel, ticket)
        await send_pack(worker, (job, 0, 5, 12))  # it has ended

    async with swarm_of(tmp_path, (0, 4, packs)) as swarm:
        assert await swarm.ask(5) == [7, 8, 9, 10, 11]
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert not swarm.overlay.statistics().violations


async def test_all_tokens_may_come_in_packs(tmp_path: Path) -> None:
    async def packs(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await send_pack(worker, *((ticket.job_id, 0, index, 7 + index) for index in range(ticket.max_tokens)))
        await worker.until_end(channel, ticket)

    async with swarm_of(tmp_path, (0, 4, packs)) as swarm, swarm.runner.generate(request(40)) as job:
        sampled = [each async for each in job.tokens()]
    assert [each.token for each in sampled] == [*range(7, 47)]
    assert [each.finish for each in sampled] == [""] * 39 + ["length"]


async def never_there(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.send(Token(index=1, token=7))
    while True:
        await channel.send(Ping())
        await trio.sleep(0.1)


async def far_ahead(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.send(Token(index=40, token=7))
    await trio.sleep(LIMIT)


async def twice(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await send_pack(worker, (ticket.job_id, 0, 0, 7), (ticket.job_id, 0, 0, 7))
    await trio.sleep(LIMIT)


async def no_end(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.send(Token(index=0, token=7, finish="stop"))
    await trio.sleep(LIMIT)


async def no_such_token(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await send_pack(worker, (ticket.job_id, 0, 0, MANIFEST.vocab_size))
    await trio.sleep(LIMIT)


@pytest.mark.parametrize("script", [never_there, far_ahead, no_end, no_such_token])
async def test_a_last_stage_that_breaks_the_order_is_counted_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.setattr(job_module, "_EARLY_S", 0.3)
    async with swarm_of(tmp_path, (0, 4, script), (0, 4, honest)) as swarm:
        liar, good = swarm.workers
        swarm.view.blame(good.peer_id, 1, NetworkError("so that the liar comes first"))
        assert await swarm.ask() == [7, 8, 9]
        assert swarm.overlay.statistics().violations == {liar.peer_id: 1}


async def test_a_token_that_comes_twice_is_counted(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, twice)) as swarm, trio.open_nursery() as nursery:
        nursery.start_soon(swarm.ask)  # it waits for another worker then
        with trio.fail_after(LIMIT):
            while swarm.overlay.statistics().violations != {swarm.workers[0].peer_id: 1}:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_row", [False, True])
async def test_who_is_not_the_last_stage_cannot_say_what_comes_of_a_job(tmp_path: Path, *, is_row: bool) -> None:
    told = trio.Event()

    async def lies(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        row = Rows(jobs=((ticket.job_id, 0, 4),), tensor=TensorHeader(dtype="float32", shape=(1, 1)))
        await send_pack(worker, (ticket.job_id, 0, 0, 1), rows=row if is_row else None)
        told.set()
        await worker.until_end(channel, ticket)

    async def waits(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await told.wait()
        await honest(worker, channel, ticket)

    async with swarm_of(tmp_path, (0, 2, lies), (2, 4, waits)) as swarm:
        assert await swarm.ask() == [7, 8, 9]
        assert swarm.overlay.statistics().violations == {swarm.workers[0].peer_id: 1}
