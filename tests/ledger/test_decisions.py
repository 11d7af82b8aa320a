"""What is held pays nobody until its operator decides, and then once: the worker, or the client."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, update

from azu.economics import split
from azu.ledger import Earning, EndedJob, Ledger, Outcome, Refusal, Reserved, Shortfall, schema
from azu.ledger.accounts import FREE, PLATFORM, client, held, worker
from azu.ledger.decisions import OUTCOMES, _held_of
from tests.ledger.books import FOREVER, PEERS, WALLET, opened

JOB = "a" * 32
COST = 600  # 300, 200 and 100, of which 240, 160 and 80 are the workers'


def ended(job_id: str, *held_stages: int) -> EndedJob:
    """A job of three stages with 3, 2 and 1 layers, which ran one token."""
    earnings = tuple(
        Earning(peer_id, start, end, 1, end - start, split(100 * (end - start)).worker, "held", None, "contradicted")
        if stage in held_stages
        else Earning(peer_id, start, end, 1, end - start, split(100 * (end - start)).worker, "credited")
        for stage, (peer_id, start, end) in enumerate(zip(PEERS, (0, 3, 5), (3, 5, 6), strict=True))
    )
    return EndedJob(job_id, 0, "c" * 64, 1, 1, 6, COST, earnings)


async def settled(ledger: Ledger, *, reserved: int = 1_000) -> None:
    """A job of which the second and the third stage's earnings are held."""
    await ledger.deposit("none", "test", "1", WALLET, 1_000)
    await ledger.reserve(JOB, WALLET, reserved, expires_at=FOREVER)
    await ledger.settle(ended(JOB, 1, 2))


async def balances(ledger: Ledger) -> tuple[int, ...]:
    """Of the second worker, of what is held of its, of the platform and of the client."""
    accounts = (worker(PEERS[1]), held(PEERS[1]), PLATFORM, client(WALLET))
    return tuple([await ledger.balance(account) for account in accounts])


async def test_held_earnings_go_to_the_worker(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        assert await balances(ledger) == (0, 160, 120, 400)
        assert await ledger.decide(JOB, 0, 1, "worker") == "worker"
        assert await balances(ledger) == (160, 0, 120, 400)
        assert [each.outcome for each in await ledger.held()] == ["worker", None]


async def test_held_earnings_go_back_to_the_client_with_the_platforms_share(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        assert await ledger.decide(JOB, 0, 1, "client") == "client"
        assert await balances(ledger) == (0, 0, 80, 600)


async def test_what_a_client_gets_back_its_key_may_spend_again(url: str) -> None:
    async with opened(url, key_limits=lambda _, key_ids: dict.fromkeys(key_ids, 700)) as ledger:
        await ledger.deposit("none", "test", "1", WALLET, 10_000)
        await ledger.reserve(JOB, WALLET, 700, "key", expires_at=FOREVER)
        await ledger.settle(ended(JOB, 1, 2))
        assert await ledger.spent("key") == COST
        await ledger.decide(JOB, 0, 2, "worker")
        assert await ledger.spent("key") == COST
        for _ in range(2):
            await ledger.decide(JOB, 0, 1, "client")
            assert await ledger.spent("key") == COST - 200
        assert isinstance(await ledger.reserve("b" * 32, WALLET, 301, "key", expires_at=FOREVER), Shortfall)
        assert isinstance(await ledger.reserve("b" * 32, WALLET, 300, "key", expires_at=FOREVER), Reserved)


async def test_what_clients_were_given_back_before_is_taken_off_their_keys(url: str) -> None:
    """As a ledger of before revision 0006 has it, in which only balances knew of it."""
    async with opened(url, key_limits=lambda _, key_ids: {}) as ledger:
        await ledger.deposit("none", "test", "1", WALLET, 10_000)
        for job_id, key_id in ((JOB, "key"), ("b" * 32, None)):
            await ledger.reserve(job_id, WALLET, 700, key_id, expires_at=FOREVER)
            await ledger.settle(ended(job_id, 1, 2))
            await ledger.decide(job_id, 0, 1, "client")

        def go_back(connection: Connection) -> None:
            connection.execute(update(schema.key_spending).values(spent=COST))
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0005'")

        await ledger.write(go_back)
        assert [each.where for each in await ledger.verify()] == ["key key"]
        async with opened(url) as again:
            assert await again.spent("key") == COST - 200


async def test_a_decision_is_made_once(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        for _ in range(2):
            assert await ledger.decide(JOB, 0, 1, "worker") == "worker"
        other = await ledger.decide(JOB, 0, 1, "client")
        assert isinstance(other, Refusal)
        assert other.code == "decided_before"
        assert await balances(ledger) == (160, 0, 120, 400)


async def test_of_two_decisions_at_once_one_counts(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        answers: list[Outcome | Refusal] = []

        async def decide(outcome: Outcome) -> None:
            answers.append(await ledger.decide(JOB, 0, 1, outcome))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide, "worker")
            nursery.start_soon(decide, "client")
        assert sum(isinstance(each, Refusal) for each in answers) == 1
        assert (await balances(ledger))[1] == 0


async def test_only_what_is_held_can_be_decided(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        for place in ((JOB, 0, 0), (JOB, 1, 1), (JOB, 0, 3), ("b" * 32, 0, 1)):
            refusal = await ledger.decide(*place, "worker")
            assert isinstance(refusal, Refusal)
            assert refusal.code == "not_held"


async def test_a_client_gets_no_more_back_than_it_paid(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger, reserved=300)  # half of what it cost; the platform bore the rest
        assert await balances(ledger) == (0, 160, -180, 700)
        for stage in (1, 2):
            await ledger.decide(JOB, 0, stage, "client")
        assert await ledger.balance(client(WALLET)) == 700 + 100 + 50


async def test_a_decision_that_was_tampered_with_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    async with Ledger.open(path, currency="wei") as ledger:
        await settled(ledger)
        await ledger.decide(JOB, 0, 1, "worker")
    with closing(sqlite3.connect(path)) as db, db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
    for kind, finding in (("held-refunded", "the postings are not those"), ("gift", "nothing tells what")):
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE transactions SET kind = ? WHERE key LIKE 'held:%'", (kind,))
        async with Ledger.open(path, currency="wei") as ledger:
            found = [each.what for each in await ledger.verify() if each.where == f"held:{JOB}:0:1"]
        assert [each.startswith(finding) for each in found] == [True]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(1, 10**6), st.integers(1, 2**40), st.data())
def test_what_is_given_back_never_exceeds_what_was_charged(
    layers: list[int], tokens: int, price: int, data: st.DataObject
) -> None:
    cost = sum(layers) * tokens * price
    charged = data.draw(st.integers(0, cost))
    found = [
        _held_of(
            {
                "job_id": JOB,
                "epoch": 0,
                "stage": stage,
                "peer_id": PEERS[0],
                "tokens": tokens,
                "reason": "short",
                "earned": split(count * tokens * price).worker,
                "first_layer": 0,
                "end_layer": count,
                "receipt": None,
                "settled_at": 0,
                "wallet": WALLET,
                "key_id": None,
                "captured": charged,
                "cost": cost,
                "kind": None,
                "all_layers": sum(layers) * tokens,
                "token_layers": count * tokens,
            }
        )
        for stage, count in enumerate(layers)
    ]
    assert charged - len(layers) < sum(each.refund for each in found) <= charged
    for each in found:
        for outcome in OUTCOMES:
            assert sum(amount for _, amount in each.moves(outcome)) == 0


async def test_a_free_job_gives_back_to_free(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.settle(ended(JOB, 0), is_free=True)
        await ledger.decide(JOB, 0, 0, "client")
        assert await ledger.balance(FREE) == -300


async def test_held_earnings_are_found_by_worker_and_by_job(url: str) -> None:
    async with opened(url) as ledger:
        await settled(ledger)
        await ledger.settle(ended("b" * 32, 2), is_free=True)
        assert [(each.job_id[0], each.stage) for each in await ledger.held()] == [("b", 2), ("a", 1), ("a", 2)]
        assert [each.job_id[0] for each in await ledger.held(peer_id=PEERS[2])] == ["b", "a"]
        assert [each.stage for each in await ledger.held(job_id=JOB)] == [1, 2]
        first = (await ledger.held(job_id=JOB))[0]
        assert (first.peer_id, first.earned, first.refund, first.wallet) == (PEERS[1], 160, 200, WALLET)
