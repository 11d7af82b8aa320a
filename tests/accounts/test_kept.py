"""Requests that outlive their coordinator: led by one at a time, whatever the others think of it, and settled once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio

from azu.accounts.kept import Claimed, KeptRequests, KeptRow, Lead
from azu.accounts.presence import Presence
from azu.ledger import Closed, EndedJob, Ledger, Refusal
from tests.coordinator.api.paying import ALICE, OTHER, OWNER

JOB = "0" * 32
ROW = KeptRow("a" * 32, "stream", "d" * 64, ALICE.address, b"asked", ((JOB, b"before"), ("1" * 32, b"other")))


class House:
    """One coordinator's view of the ledger that it shares."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.presence = Presence(ledger)
        self.kept = KeptRequests(ledger, self.presence)

    def take_for_gone(self, peer_id: str) -> None:
        """As after LEASE_S of silence, or as whoever cannot see it beat."""
        self.presence.alive -= {peer_id}

    async def settle(self) -> Closed | Refusal:
        return await self.ledger.settle(EndedJob(JOB, 1, "d" * 64, 1, 1, 4, 0, ()), is_free=True)


@asynccontextmanager
async def two(url: str) -> AsyncIterator[tuple[House, House]]:
    async with AsyncExitStack() as stack:
        houses = [
            House(await stack.enter_async_context(Ledger.open(url, currency="wei", owner=owner)))
            for owner in (OWNER, OTHER)
        ]
        for house in (*houses, *houses):
            await house.presence.confirm()
        yield houses[0], houses[1]


def is_of(claimed: Claimed | None, term: int, standing: bytes = b"before") -> bool:
    return claimed == (Lead(ROW.request_id, term), b"asked", [standing, b"other"])


async def test_it_goes_from_one_to_the_other_and_back(url: str) -> None:
    async with two(url) as (one, other):
        lead = await one.kept.begin(ROW)
        assert await one.kept.begin(ROW) == lead, "the same call again"
        assert await one.kept.note(lead, 0, b"now")
        assert (await other.kept.waiting(), await other.kept.claim(ROW.request_id)) == ([], None)
        await one.kept.let_go(lead)
        assert not await one.kept.note(lead, 0, b"late"), "it has let go"
        assert [each.request_id for each in await other.kept.waiting()] == [ROW.request_id]
        assert is_of(await other.kept.claim(ROW.request_id), 2, b"now")
        assert await one.kept.claim(ROW.request_id) is None
        await other.kept.let_go_all()
        assert is_of(await one.kept.claim(ROW.request_id), 3, b"now")
        await one.kept.forget(lead)
        assert (await one.kept.find(ROW.request_id)) is not None, "of an earlier term"
        await one.kept.forget(Lead(ROW.request_id, 3))
        assert await one.kept.find(ROW.request_id) is None


async def test_who_is_gone_leads_no_more(url: str) -> None:
    """It may be back, and think that nothing has happened: what it writes then counts for nothing."""
    async with two(url) as (one, other):
        lead, life = await one.kept.begin(ROW), one.presence.life
        other.take_for_gone(OWNER)
        assert [each.leader for each in await other.kept.waiting()] == [OWNER]
        assert is_of(await other.kept.claim(ROW.request_id), 2)
        assert not await one.kept.note(lead, 0, b"late")
        assert not await one.kept.leads(lead)
        await one.kept.let_go(lead)
        await one.kept.forget(lead)
        refused = await one.settle()
        assert isinstance(refused, Refusal)
        assert refused.code == "led_elsewhere"
        assert one.presence.life == life + 1, "it is told with its next beat"
        found = await other.kept.find(ROW.request_id)
        assert found is not None
        assert found.leader == OTHER
        assert await one.ledger.release(JOB) == refused
        assert await other.kept.leads(Lead(ROW.request_id, 2))
        assert isinstance(await other.settle(), Closed)
        await other.kept.forget(Lead(ROW.request_id, 2))
        assert await other.ledger.verify() == []


async def test_all_that_one_led_can_be_claimed_when_it_is_gone(url: str) -> None:
    async with two(url) as (one, other):
        second = replace(ROW, request_id="b" * 32, jobs=(("2" * 32, b""),))
        for row in (ROW, second):
            await one.kept.begin(row)
        other.take_for_gone(OWNER)
        for row in (ROW, second):
            assert await other.kept.claim(row.request_id) is not None


async def test_who_beats_is_not_deposed_by_whoever_takes_it_for_gone(url: str) -> None:
    async with two(url) as (one, other):
        lead = await one.kept.begin(ROW)
        await one.presence.confirm()  # which the other one has not seen
        other.take_for_gone(OWNER)
        assert await other.kept.claim(ROW.request_id) is None
        assert await one.kept.leads(lead)
        assert await one.kept.note(lead, 0, b"now")


async def test_of_many_that_claim_one_gets_it(url: str) -> None:
    async with two(url) as (one, other):
        await one.kept.let_go(await one.kept.begin(ROW))
        won: list[Claimed] = []

        async def claim(house: House) -> None:
            if (claimed := await house.kept.claim(ROW.request_id)) is not None:
                won.append(claimed)

        async with trio.open_nursery() as nursery:
            for house in (one, other) * 4:
                nursery.start_soon(claim, house)
        assert [claimed.lead.term for claimed in won] == [2]


async def test_a_claim_whose_commit_was_not_confirmed_finds_itself(url: str) -> None:
    async with two(url) as (one, _):
        await one.kept.let_go(await one.kept.begin(ROW))
        before: list[int] = []
        for _ in range(2):
            claimed = await one.ledger.write(lambda connection: one.kept._claim(ROW.request_id, before, connection))
            assert is_of(claimed, 2)


async def test_another_coordinators_beats_are_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.accounts.presence.BEAT_S", 0.05)
    async with two(url) as (one, other), trio.open_nursery() as nursery:
        await nursery.start(one.presence.run, "http://one")
        scope: trio.CancelScope = await nursery.start(cancellable, other.presence)
        with trio.fail_after(30):
            assert await one.presence.lives(OTHER)
            assert await other.presence.lives(OWNER)
            assert (other.presence.url_of(OWNER), other.presence.others()) == ("http://one", (OWNER,))
            scope.cancel()
            while OTHER in one.presence.alive:  # it has taken itself off
                await trio.sleep(0.02)
            assert not await one.presence.lives(OTHER)
        nursery.cancel_scope.cancel()


async def cancellable(presence: Presence, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(presence.run, "http://other")
            task_status.started(scope)
