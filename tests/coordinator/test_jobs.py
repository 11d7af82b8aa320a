"""Running jobs over workers that refuse, lie, stall and die: the client gets its answer where there is one to be had,
each stage hears the end, and who fails jobs is not chosen for ever.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from azu.channel import Channel
from azu.errors import AzuError, CapacityError, NetworkError
from azu.tickets import JobTicket, sign_receipt
from azu.wire.messages import Failed, Inherited, Leaving, Next, Ping, ReceiptReply, Token, Waiting, encode_message
from coordinator import attendance as attendance_module
from coordinator import jobs as jobs_module
from coordinator import mender as mender_module
from coordinator.api.errors import from_exception
from coordinator.api.settings import ApiSettings
from tests.coordinator.fake_workers import KV_TOKENS, MANIFEST, FakeWorker, honest, idle, refuses, request, swarm_of

Script = Callable[[FakeWorker, Channel, JobTicket], Awaitable[None]]


def only_error(caught: pytest.ExceptionInfo[BaseException]) -> AzuError:
    """The error as the HTTP side gets it out of the nurseries."""
    return from_exception(caught.value, ApiSettings())


async def test_tokens_come_in_order_and_every_stage_hears_the_end(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 2, honest), (2, 4, honest)) as swarm:
        async with swarm.runner.generate(request(5)) as job:
            tokens = [(sampled.token, sampled.finish) async for sampled in job.tokens()]
            assert sorted(swarm.runner.room.cuts(MANIFEST.digest)) == [(0, 2), (2, 4)]
            assert swarm.runner.room.cuts("another") == []
            report = await job.finish()
        assert swarm.runner.room.cuts(MANIFEST.digest) == []
        assert tokens == [(7, ""), (8, ""), (9, ""), (10, ""), (11, "length")]
        assert [stage.state for stage in report.stages] == ["credited", "credited"]
        assert report.token_layers == (4 + 5 - 1) * 4
        assert [worker.ended for worker in swarm.workers] == [1, 1]


async def test_a_client_that_leaves_at_once_ends_the_job_at_once(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, idle)) as swarm:
        worker = swarm.workers[0]
        for pause in (0.0, 0.001, 0.003, 0.01, 0.1):
            before = len(worker.tickets)
            with trio.move_on_after(pause):
                await swarm.ask()
            left = trio.current_time()
            while worker.ended < len(worker.tickets):
                await trio.sleep(0.005)
            assert trio.current_time() - left < 4.5  # waiting for a receipt that does not come takes 5 s
            assert len(worker.tickets) - before <= 1


async def test_a_client_that_leaves_in_the_middle_does_not_cost_the_workers_their_pay(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 2, honest), (2, 4, honest)) as swarm:
        with trio.CancelScope() as client:
            async with swarm.runner.generate(request(50)) as job:
                async for _ in job.tokens():
                    client.cancel()
        assert client.cancelled_caught
        assert [stage.state for stage in (await job.finish()).stages] == ["credited", "credited"]


async def test_a_stage_without_room_is_asked_again_when_its_record_says_so(tmp_path: Path) -> None:
    async def full_once(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await (refuses("no_capacity") if len(worker.tickets) < 5 else honest)(worker, channel, ticket)

    async with swarm_of(tmp_path, (0, 4, full_once)) as swarm:
        assert await swarm.ask() == [7, 8, 9]
        assert len(swarm.workers[0].tickets) == 5
        assert swarm.view.faults(swarm.workers[0].peer_id) == 0


async def test_another_worker_takes_a_job_that_gave_no_token(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, refuses("not_loaded")), (0, 4, honest)) as swarm:
        liar, good = swarm.workers
        swarm.view.blame(good.peer_id, 1, NetworkError("so that the liar comes first"))
        assert await swarm.ask() == [7, 8, 9]
        for _ in range(5):
            assert await swarm.ask() == [7, 8, 9]
        await trio.sleep(1.5)  # its next record does not wash it clean
        assert await swarm.ask() == [7, 8, 9]
        assert (len(liar.tickets), len(good.tickets)) == (1, 7)


async def test_a_failing_worker_without_substitute_is_tried_a_few_times(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, refuses("not_loaded"))) as swarm:
        with pytest.raises(BaseExceptionGroup) as caught:
            await swarm.ask()
        assert only_error(caught).code == "stage_lost"
        assert len(swarm.workers[0].tickets) == 3
        swarm.workers[0].script = honest
        assert await swarm.ask() == [7, 8, 9]


async def test_a_worker_that_is_gone_is_no_cover_from_then_on(tmp_path: Path) -> None:
    async def leaves(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await worker.overlay.disconnect(swarm.overlay.peer_id)

    async with swarm_of(tmp_path, (0, 4, leaves)) as swarm:
        with pytest.raises(CapacityError) as caught:
            await swarm.ask()
        assert caught.value.code == "model_not_covered"


async def test_who_says_again_and_again_that_it_leaves_is_heard_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "coordinator.mender")

    async def leaves(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        for _ in range(50):
            await channel.send(Leaving())
        await honest(worker, channel, ticket)

    async with swarm_of(tmp_path, (0, 4, leaves)) as swarm:
        assert await swarm.ask() == [7, 8, 9]
    assert [record.message for record in caplog.records].count("stage is leaving") == 1


async def test_an_accuser_does_not_stay_when_its_victims_go(tmp_path: Path) -> None:
    async def accuses(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await channel.send(Failed(code="stage_lost", message="it left", peer_id=ticket.stages[1].peer_id))
        await worker.until_end(channel, ticket)

    plans: list[tuple[int, int, Script]] = [(0, 2, accuses), (2, 4, idle), (2, 4, idle), (0, 2, idle)]
    async with swarm_of(tmp_path, *plans) as swarm:
        for worker in swarm.workers[1:3]:
            worker.script = lambda w, c, t: (honest if _honest_chain(t) else idle)(w, c, t)
        liar = swarm.workers[0].peer_id

        def _honest_chain(ticket: JobTicket) -> bool:
            return ticket.stages[0].peer_id != liar

        for _ in range(3):
            assert await swarm.ask() == [7, 8, 9]
        assert len(swarm.workers[0].tickets) <= 3


async def test_a_job_that_no_worker_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, honest)) as swarm:
        started = time.monotonic()
        with pytest.raises(CapacityError, match="max_tokens"):
            await swarm.ask(max_tokens=KV_TOKENS)
        assert time.monotonic() - started < 20  # waiting for room takes 30 s
        assert not swarm.workers[0].tickets


async def test_a_job_waits_for_room(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, idle)) as swarm, trio.open_nursery() as nursery:
        client = trio.CancelScope()

        @nursery.start_soon
        async def holds_the_room() -> None:
            with client:
                await swarm.ask(max_tokens=4, prompt=KV_TOKENS - 5)
            swarm.workers[0].script = honest

        while not swarm.workers[0].tickets:
            await trio.sleep(0.01)
        client.deadline = trio.current_time() + 0.5
        assert await swarm.ask(max_tokens=20) == list(range(7, 27))


async def test_rooms_that_others_hold_are_not_ours(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, idle)) as swarm:
        worker = swarm.workers[0]
        worker.claims = {"kv_tokens_free": 100, "sequence": 1}
        while swarm.view.workers()[0].kv_tokens_free != 100:
            await trio.sleep(0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.ask, 60)
            while not worker.tickets:
                await trio.sleep(0.01)
            # Its record is older than our job, which began with 5 positions.
            assert swarm.runner._route(request(4, 95)) is None
            assert swarm.runner._route(request(4, 94)) is not None
            worker.claims["sequence"] = 2
            while swarm.runner._route(request(4, 99)) is None:
                await trio.sleep(0.01)
            assert swarm.runner._route(request(4, 100)) is None
            nursery.cancel_scope.cancel()


async def dies(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.send(Token(index=0, token=7))
    await trio.sleep(0.05)


async def test_a_stage_that_nobody_takes_over_ends_the_stream_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mender_module, "_REPLACE_S", 0.2)
    tokens: list[int] = []
    async with swarm_of(tmp_path, (0, 4, dies)) as swarm:

        async def read() -> None:
            async with swarm.runner.generate(request()) as job:
                async for sampled in job.tokens():
                    tokens.append(sampled.token)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(BaseExceptionGroup) as caught:
            await read()
        assert only_error(caught).code == "stage_lost"
        assert tokens == [7]
        assert len(swarm.workers[0].tickets) == 1


async def too_many(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    for index in range(ticket.max_tokens + 5):
        finish: Any = "length" if index + 1 == ticket.max_tokens else ""
        await channel.send(Token(index=index, token=7, finish=finish))
    await worker.until_end(channel, ticket)


async def test_tokens_after_the_last_are_neither_taken_nor_charged(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, too_many)) as swarm:
        async with swarm.runner.generate(request(3)) as job:
            await trio.sleep(0.3)  # a slow reader
            assert len([sampled async for sampled in job.tokens()]) == 3
            assert (await job.finish()).completion_tokens == 3
        assert swarm.overlay.statistics().violations == {swarm.workers[0].peer_id: 1}


async def early_receipt(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.send(ReceiptReply(), sign_receipt(worker.identity, worker.receipt(ticket)))
    await trio.sleep(5)


async def wrong_message(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.stream.send_all(*encode_message(Next(index=0, token=1)))
    await trio.sleep(5)


async def garbage(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    await channel.stream.send_all(b"\xff" * 64)
    await trio.sleep(5)


async def inherits_twice(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    for positions in range(2):
        await channel.send(Inherited(positions=positions))
    await trio.sleep(5)


@pytest.mark.parametrize("script", [early_receipt, wrong_message, garbage, inherits_twice])
async def test_a_worker_that_breaks_the_protocol_is_counted_and_replaced(tmp_path: Path, script: Script) -> None:
    async with swarm_of(tmp_path, (0, 4, script), (0, 4, honest)) as swarm:
        liar, good = swarm.workers
        swarm.view.blame(good.peer_id, 1, NetworkError("so that the liar comes first"))
        assert await swarm.ask() == [7, 8, 9]
        assert swarm.overlay.statistics().violations == {liar.peer_id: 1}


async def test_a_job_that_stalls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stalls(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ping, channel)
            await worker.until_end(channel, ticket)
            nursery.cancel_scope.cancel()

    monkeypatch.setattr(mender_module, "_STALL_S", 0.5)
    monkeypatch.setattr(jobs_module, "_TRIES", 1)
    async with swarm_of(tmp_path, (0, 4, stalls)) as swarm:
        with pytest.raises(BaseExceptionGroup) as caught:
            await swarm.ask()
        assert only_error(caught).code == "job_stalled"
        assert swarm.workers[0].ended == 1


async def _ping(channel: Channel) -> None:
    while True:
        await channel.send(Ping())
        await trio.sleep(0.1)


async def test_a_job_that_waits_for_kv_cache_does_not_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        for _ in range(6):
            await channel.send(Waiting())
            await trio.sleep(0.5)
        await honest(worker, channel, ticket)

    monkeypatch.setattr(mender_module, "_STALL_S", 0.5)
    monkeypatch.setattr(attendance_module, "_WAITING_S", 2.0)
    async with swarm_of(tmp_path, (0, 4, waits)) as swarm:
        assert await swarm.ask() == [7, 8, 9]
        assert swarm.workers[0].ended == 1


async def test_a_stage_that_says_for_ever_that_it_waits_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def waits(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        with suppress(NetworkError):
            while True:
                await channel.send(Waiting())
                await trio.sleep(0.1)

    monkeypatch.setattr(mender_module, "_STALL_S", 0.5)
    monkeypatch.setattr(jobs_module, "_TRIES", 1)
    monkeypatch.setattr(attendance_module, "_MAX_WAITS", 3)
    monkeypatch.setattr(attendance_module, "_WAITING_S", 0.5)
    async with swarm_of(tmp_path, (0, 4, waits)) as swarm:
        with pytest.raises(BaseExceptionGroup) as caught:
            await swarm.ask()
        assert only_error(caught).code == "job_stalled"


@pytest.mark.parametrize("claims", [{"kv_tokens": 2**63 - 1, "kv_tokens_free": 2**63 - 1}, {"layer_us": 2**31 - 1}])
async def test_boasts_in_a_record_break_nothing(tmp_path: Path, claims: dict[str, int]) -> None:
    async with swarm_of(tmp_path, (0, 4, honest)) as swarm:
        swarm.workers[0].claims = claims
        await trio.sleep(1.2)
        assert await swarm.ask() == [7, 8, 9]
