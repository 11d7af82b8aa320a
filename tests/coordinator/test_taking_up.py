"""Jobs that their coordinator left to their stages, and takes up again; real stages, on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.errors import NetworkError
from azu.tickets import JobTicket
from coordinator import mender as mender_module
from coordinator.agreement import Handover
from coordinator.generation import GenerationRequest
from coordinator.job import RunningJob
from coordinator.jobs import JobRunner
from coordinator.journal import Left
from coordinator.swarm import SwarmView
from tests.coordinator.test_draining import leaves_after
from tests.coordinator.test_failover import CHUNKS, COUNT, POSITIONS, PROMPT, THREE, pair
from tests.node.real_stages import TinyModel, identity, peer, tiny_model
from tests.real_swarm import RealSwarm, real_swarm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def let_go(swarm: RealSwarm) -> AsyncIterator[tuple[GenerationRequest, list[JobTicket], list[int]]]:
    """A job that was let go after some tokens, the tickets that were noted, and these tokens."""
    tickets: list[JobTicket] = []

    async def note(ticket: JobTicket, _: object) -> bool:
        tickets.append(ticket)
        return True

    request = replace(swarm.request(PROMPT, COUNT), note=note)
    tokens: list[int] = []
    async with swarm.runner.generate(request) as job, aclosing(job.tokens()) as answer:  # type: ignore[type-var]
        async for sampled in answer:
            tokens.append(sampled.token)
            if len(tokens) == 5:
                job.let_go()
                break
    assert [ticket.epoch for ticket in tickets] == [0]
    yield request, tickets, tokens


async def rest_of(swarm: RealSwarm, request: GenerationRequest, ticket: JobTicket) -> tuple[list[int], RunningJob]:
    async with swarm.runner.take_up(request, ticket, ()) as job:
        tokens = [sampled.token async for sampled in job.tokens()]
        await job.finish()
    return tokens, job


async def test_a_job_goes_on_where_it_was_and_is_paid_once(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm, let_go(swarm) as (request, tickets, before):
        assert await swarm.meter.earnings() == {}
        tokens, job = await rest_of(swarm, request, tickets[-1])
        assert tokens == model.greedy(PROMPT, COUNT)
        assert tokens[: len(before)] == before
        assert all(sum(worker.rows) == POSITIONS for worker in swarm.workers)  # nobody ran anything twice
        report = await job.finish()
        assert (report.completion_tokens, [stage.state for stage in report.stages]) == (COUNT, ["credited"] * 3)
        assert sum((await swarm.meter.earnings()).values()) == report.credited
        assert [ticket.epoch for ticket in tickets] == list(range(job.ticket.epoch + 1))
        await swarm.until_idle()


async def test_it_may_be_ended_and_is_paid_as_far_as_it_came(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm, let_go(swarm) as (request, tickets, before):
        async with swarm.runner.take_up(request, tickets[-1], ()) as job:
            report = await job.finish()
        assert len(before) <= report.completion_tokens < COUNT
        assert {stage.state for stage in report.stages} == {"credited"}
        assert report.token_layers == 4 * (len(PROMPT) + report.completion_tokens - 1)
        assert sum((await swarm.meter.earnings()).values()) == report.credited
        await swarm.until_idle()


async def test_it_may_be_let_go_again(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm, let_go(swarm) as (request, tickets, _):
        async with swarm.runner.take_up(request, tickets[-1], ()) as job:
            job.let_go()
        tokens, _ = await rest_of(swarm, request, tickets[-1])
        assert tokens == model.greedy(PROMPT, COUNT)


@pytest.mark.parametrize("lost", [0, 1, 3])
async def test_a_worker_that_died_meanwhile_is_replaced(model: TinyModel, tmp_path: Path, lost: int) -> None:
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm, let_go(swarm) as (request, tickets, _):
        pair(swarm, lost)[0].kill()
        tokens, _ = await rest_of(swarm, request, tickets[-1])
        assert tokens == model.greedy(PROMPT, COUNT)


async def test_it_ends_where_nobody_knows_its_tokens(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.jobs._FIND_S", 2.0)
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm, let_go(swarm) as (request, tickets, _):
        for start in (0, 3):
            pair(swarm, start)[0].kill()
        with pytest.RaisesGroup(NetworkError, flatten_subgroups=True) as lost:
            await rest_of(swarm, request, tickets[-1])
        (error,) = lost.value.exceptions
        assert getattr(error, "code", "") == "tokens_lost"
        assert await swarm.meter.earnings() == {}
        await swarm.until_idle()


async def test_who_left_before_is_paid_for_what_it_did(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mender_module, "_ENDS_S", 0.0)
    async with real_swarm(model, tmp_path, *THREE, *THREE) as swarm:
        leaver = pair(swarm, 1)[0]
        leaves_after(swarm, CHUNKS + 3, leaver, leaver)
        noted: list[tuple[JobTicket, tuple[Left, ...]]] = []

        async def note(ticket: JobTicket, handovers: Sequence[Handover]) -> bool:
            noted.append((ticket, tuple(map(Left.of, handovers))))
            return True

        request = replace(swarm.request(PROMPT, 120), note=note)
        async with swarm.runner.generate(request) as job, aclosing(job.tokens()) as answer:  # type: ignore[type-var]
            async for _ in answer:
                if any(each.receipts and each.words for each in noted[-1][1]):
                    job.let_go()
                    break
        ticket, left = noted[-1]
        async with swarm.runner.take_up(request, ticket, [each.handover() for each in left]) as job:
            assert [sampled.token async for sampled in job.tokens()] == model.greedy(PROMPT, 120)
            report = await job.finish()
        assert leaver.peer_id in {stage.peer_id for stage in report.stages}
        assert {stage.state for stage in report.stages} == {"credited"}
        assert sum(stage.token_layers for stage in report.stages) == report.token_layers


async def test_another_coordinator_goes_on_with_it(model: TinyModel, tmp_path: Path) -> None:
    """If the first one's ticket named it; and what that one still says of the job counts no more."""
    async with real_swarm(model, tmp_path, *THREE) as swarm, peer(98) as overlay, trio.open_nursery() as nursery:
        swarm.runner._successors = lambda: [identity(98).peer_id]
        for worker in swarm.workers:
            await overlay.connect(worker.peer_id, worker.real.overlay.addrs)
        view = SwarmView(overlay)
        nursery.start_soon(view.run)
        for worker in swarm.workers:
            view._meet(worker.peer_id)
        runner = JobRunner(identity(98), overlay, view, swarm.meter, price=2)
        async with let_go(swarm) as (request, tickets, before):
            first = tickets[-1]
            async with runner.take_up(request, first, ()) as job:
                tokens = [sampled.token async for sampled in job.tokens()]
                report = await job.finish()
        assert tokens == model.greedy(PROMPT, COUNT)
        assert tokens[: len(before)] == before
        assert all(sum(worker.rows) == POSITIONS for worker in swarm.workers)
        assert {stage.state for stage in report.stages} == {"credited"}
        assert job.ticket.coordinator == identity(98).peer_id
        assert job.ticket.epoch > first.epoch
        nursery.cancel_scope.cancel()


async def test_who_leads_a_job_no_more_ends_and_settles_nothing(model: TinyModel, tmp_path: Path) -> None:
    async def leads() -> bool:
        return False

    async with real_swarm(model, tmp_path, *THREE) as swarm, let_go(swarm) as (request, tickets, _):
        async with swarm.runner.take_up(replace(request, leads=leads), tickets[-1], ()) as job:
            report = await job.finish()
        assert (await swarm.meter.earnings(), report.credited) == ({}, 0)
        tokens, _ = await rest_of(swarm, request, job.ticket)
        assert tokens == model.greedy(PROMPT, COUNT)
        assert sum((await swarm.meter.earnings()).values()) > 0


async def test_a_job_that_cannot_be_amended_any_more_ends_as_led_elsewhere(model: TinyModel, tmp_path: Path) -> None:
    async with real_swarm(model, tmp_path, *THREE) as swarm, let_go(swarm) as (request, tickets, _):

        async def note(_ticket: JobTicket, _handovers: object) -> bool:
            return False

        with pytest.RaisesGroup(NetworkError, flatten_subgroups=True) as lost:
            await rest_of(swarm, replace(request, note=note), tickets[-1])
        (error,) = lost.value.exceptions
        assert getattr(error, "code", "") == "led_elsewhere"
