"""A stage whose coordinator goes away: it keeps the job for a while, and goes on with whoever comes back as it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from azu.channel import Channel
from azu.identity import Identity
from azu.overlay import Overlay
from azu.tickets import JobTicket, sign_ticket
from azu.wire.messages import JOB, JOB_PROTOCOL, Amend, End, Forget, Open, Prompt, ReceiptReply, Refused, Token
from azu.wire.tokens import pack_tokens
from node import jobs as jobs_module
from tests.node.real_stages import Coordinator, TinyModel, identity, next_of, peer, prompt_of, real_ring, tiny_model
from tests.node.test_amendments import Running

PROMPT = prompt_of(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def left_alone(coordinator: Coordinator, keep_s: int, *successors: str) -> JobTicket:
    """The ticket of a job in a single stage, whose stream ends after some tokens."""
    ticket = coordinator.ticket(len(PROMPT), 3_000).model_copy(update={"successors": successors})
    async with await coordinator.overlay.open_stream(coordinator.stages[0].peer_id, JOB_PROTOCOL) as stream:
        channel = Channel(stream, JOB)
        await channel.send(Open(keep_s=keep_s), sign_ticket(coordinator.identity, ticket))
        await channel.send(Prompt(), pack_tokens(PROMPT))
        for _ in range(5):
            assert await next_of(channel, Token) is not None
    return ticket


@asynccontextmanager
async def coordinator_stream(coordinator: Coordinator, overlay: Overlay | None) -> AsyncIterator[Channel]:
    """A new job stream to the only stage."""
    stage = coordinator.stages[0]
    opened = (overlay or coordinator.overlay).open_stream(stage.peer_id, JOB_PROTOCOL, addrs=stage.overlay.addrs)
    async with await opened as stream:
        yield Channel(stream, JOB)


@asynccontextmanager
async def amending(
    coordinator: Coordinator, ticket: JobTicket, signer: Identity | None = None, overlay: Overlay | None = None
) -> AsyncIterator[Channel]:
    """A stream that begins with an amendment by this ticket."""
    async with coordinator_stream(coordinator, overlay) as channel:
        await channel.send(Amend(known=0), sign_ticket(signer or coordinator.identity, ticket))
        yield channel


def next_epoch(ticket: JobTicket) -> JobTicket:
    return ticket.model_copy(update={"epoch": ticket.epoch + 1})


async def test_a_coordinator_that_comes_back_goes_on(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        ticket = await left_alone(coordinator, 100)
        for _ in range(2):
            ticket = next_epoch(ticket)
            async with amending(coordinator, ticket) as channel:
                job = Running(coordinator, channel, ticket, [])
                paused = await job.paused()
                assert len(job.tokens) >= 5  # all, as it does not say that it has any
                assert paused.position == len(PROMPT) + len(job.tokens) - 1
                await job.resume(paused.position)
                await job.goes_on(model)
        ticket = next_epoch(ticket)
        async with amending(coordinator, ticket) as channel:
            job = Running(coordinator, channel, ticket, [])
            await job.paused()
            await channel.send(End(tokens=3))
            await job.until(ReceiptReply)
            coordinator.stages[0].assert_idle()


async def test_nothing_is_computed_while_it_is_away(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        ticket = await left_alone(coordinator, 100)
        jobs = coordinator.stages[0].jobs
        position = -1
        while position != jobs.kv_tokens_filled:
            position = jobs.kv_tokens_filled
            await trio.sleep(0.2)
        assert (jobs.count, position < len(PROMPT) + 2_999) == (1, True)
        async with amending(coordinator, next_epoch(ticket)) as channel:
            await channel.send(Forget())
            await coordinator.stages[0].until_idle()


@pytest.mark.parametrize("keep_s", [0, 1])
async def test_it_is_not_waited_for_without_end(model: TinyModel, keep_s: int) -> None:
    async with real_ring(model, 1) as coordinator:
        ticket = await left_alone(coordinator, keep_s)
        await coordinator.stages[0].until_idle()
        async with amending(coordinator, next_epoch(ticket)) as channel:
            assert (await next_of(channel, Refused)).code == "unknown_job"


async def test_a_worker_that_leaves_does_not_wait_for_it_for_long(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "_AWAY_S", 0.5)
    async with real_ring(model, 1) as coordinator:
        await left_alone(coordinator, 100)
        jobs = coordinator.stages[0].jobs
        jobs.leave()
        await jobs.until_served()
        assert jobs.count == 1


async def test_its_stage_may_be_given_out_anew(model: TinyModel) -> None:
    """To the same worker, as another one is where a coordinator takes it for lost."""
    async with real_ring(model, 1) as coordinator:
        ticket = next_epoch(await left_alone(coordinator, 100))
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            job = Running(coordinator, channel, ticket, model.greedy(PROMPT, 9))
            assert (await job.paused()).position == 0
            await job.resume(0)
            await job.goes_on(model)
        await coordinator.stages[0].until_idle()


async def test_a_second_stream_takes_the_place_of_one_that_still_seems_to_live(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator:
        ticket = coordinator.ticket(len(PROMPT), 3_000)
        async with coordinator.opened(ticket) as old:
            await old.send(Prompt(), pack_tokens(PROMPT))
            assert await next_of(old, Token) is not None
            ticket = next_epoch(ticket)
            async with amending(coordinator, ticket) as channel:
                job = Running(coordinator, channel, ticket, [])
                await job.resume((await job.paused()).position)
                await job.goes_on(model)
                await channel.send(End(tokens=3))
                await job.until(ReceiptReply)
        coordinator.stages[0].assert_idle()


async def test_nobody_else_takes_a_job_up(model: TinyModel) -> None:
    async with real_ring(model, 1) as coordinator, peer(50) as thief:
        ticket = await left_alone(coordinator, 100)
        stolen = next_epoch(ticket).model_copy(update={"coordinator": identity(50).peer_id})
        for signer, overlay, taken, code in (
            (identity(50), thief, stolen, "wrong_signer"),
            (None, thief, next_epoch(ticket), "wrong_signer"),
            (None, None, ticket, "stale_epoch"),
            (None, None, next_epoch(ticket).model_copy(update={"price": 0}), "another_job"),
        ):
            async with amending(coordinator, taken, signer, overlay) as channel:
                assert (await next_of(channel, Refused)).code == code
        ticket = next_epoch(ticket)
        async with amending(coordinator, ticket) as channel:
            job = Running(coordinator, channel, ticket, [])
            await job.resume((await job.paused()).position)
            await job.goes_on(model)
            await channel.send(Forget())
            await coordinator.stages[0].until_idle()


async def test_a_coordinator_that_was_named_goes_on_with_it(model: TinyModel) -> None:
    """If the worker trusts it; and nobody before it any more, but whom it names."""
    heir, stranger = identity(98), identity(50)
    async with real_ring(model, 1) as coordinator, peer(98) as follower, peer(50) as other:
        ticket = next_epoch(await left_alone(coordinator, 100, heir.peer_id, stranger.peer_id))
        taken = ticket.model_copy(update={"coordinator": stranger.peer_id})
        async with amending(coordinator, taken, stranger, other) as channel:
            assert (await next_of(channel, Refused)).code == "untrusted_coordinator"
        async with coordinator_stream(coordinator, other) as channel:  # nor does its stage end the job that is kept
            await channel.send(Open(keep_s=0), sign_ticket(stranger, next_epoch(taken)))
            assert (await next_of(channel, Refused)).code == "untrusted_coordinator"
        mine = ticket.model_copy(update={"coordinator": heir.peer_id, "successors": ()})
        async with amending(coordinator, mine, heir, follower) as channel:
            job = Running(coordinator, channel, mine, [])
            await job.resume((await job.paused()).position)
            await job.goes_on(model)
            async with amending(coordinator, next_epoch(ticket)) as late:
                assert (await next_of(late, Refused)).code == "wrong_signer"
            await channel.send(End(tokens=3))
            await job.until(ReceiptReply)
            await coordinator.stages[0].until_idle()
