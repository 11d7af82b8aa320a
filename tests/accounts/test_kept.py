"""Requests that outlive their coordinator: led by one at a time, whatever the others think of it, and settled once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import pytest
import trio
from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError

from azu.accounts.kept import Claimed, KeptRequests, KeptRow, Lead
from azu.accounts.presence import Presence
from azu.errors import InternalError
from azu.ledger import Closed, Database, EndedJob, Ledger, Refusal, schema
from tests.coordinator.api.paying import ALICE, OTHER, OWNER
from tests.ledger.postgres import Server

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
        assert await one.ledger.release(JOB) == refused
        assert one.presence.life == life + 1, "it is told with its next beat"
        found = await other.kept.find(ROW.request_id)
        assert found is not None
        assert found.leader == OTHER
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


async def test_what_ended_while_the_database_was_away_is_forgotten_once_it_is_back(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(postgres.url()) as (one, _):
        lead = await one.kept.begin(ROW)
        await trio.to_thread.run_sync(postgres.stop)
        with monkeypatch.context() as patch:
            patch.setattr("azu.ledger.database._RETRY_S", 0.1)
            with pytest.raises(InternalError):
                await one.kept.forget(lead)
        postgres.start()  # here, since it ends with the thread that started it
        assert await one.kept.find(ROW.request_id) is not None
        assert await one.kept.waiting() == []
        assert await one.kept.find(ROW.request_id) is None


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


async def beat_of(house: House) -> int:
    query = select(schema.coordinators.c.beat).where(schema.coordinators.c.peer_id == house.presence.me)
    return await house.ledger.read(lambda connection: connection.execute(query).scalar_one())


async def test_who_sees_nobody_else_only_looks(url: str) -> None:
    async with Ledger.open(url, currency="wei", owner=OWNER) as ledger:
        one = House(ledger)
        for _ in range(4):
            await one.presence.confirm()
        assert (await beat_of(one), one.presence.is_sure, one.presence.life) == (1, True, 1)
        async with Ledger.open(url, currency="wei", owner=OTHER) as others:
            other = House(others)
            await other.presence.confirm()
            for beat in (2, 3):
                await one.presence.confirm()
                assert await beat_of(one) == beat
            assert one.presence.others() == (OTHER,)


async def test_who_is_taken_off_the_list_comes_back_to_it(url: str) -> None:
    async with two(url) as (one, other):
        one.presence.alive -= {OTHER}  # as where it has been silent for long
        life = one.presence.life
        await other.ledger.write(lambda connection: other.presence.take_off(connection, OWNER))
        await one.presence.confirm()
        assert (await beat_of(one), one.presence.life) == (1, life + 1)


async def test_a_beat_whose_commit_was_not_confirmed_tells_that_others_took_its_place(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(url) as (one, other):
        life = one.presence.life
        await one.presence.confirm()
        await other.presence.confirm()
        assert await other.ledger.write(lambda connection: other.presence.take_off(connection, OWNER))
        writing = Database._writing
        lost: list[bool] = []

        @contextmanager
        def losing(database: Database) -> Iterator[Connection]:
            with writing(database) as connection:
                yield connection
            if not lost:  # it is committed, and the connection breaks before that is known
                lost.append(True)
                raise OperationalError("COMMIT", None, OSError("connection lost"), connection_invalidated=True)

        monkeypatch.setattr(Database, "_writing", losing)
        await one.presence.confirm()
        assert (lost, one.presence.life) == ([True], life + 1)


async def cancellable(presence: Presence, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(presence.run, "http://other")
            task_status.started(scope)
