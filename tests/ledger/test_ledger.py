"""What the ledger does, on both databases: each change once, nothing below zero, everything found again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection

from azu.economics import split
from azu.errors import InputError, InternalError
from azu.ledger import Closed, Deposited, KeyLimit, Refusal, Reserved, Shortfall
from azu.ledger.accounts import FEES, FREE, MAX_AMOUNT, PLATFORM, chain, client, held, paying, reserved, worker
from tests.ledger.books import FOREVER, OTHER, PEERS, WALLET, ended, opened

FIRST = PEERS[0]


async def test_a_job_from_deposit_to_payout(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("hyperliquid", "998", "0xd1", WALLET, 10**21)  # wei do not fit 64 bits
        reservation = await ledger.reserve("job", WALLET, 10**20, expires_at=FOREVER)
        assert isinstance(reservation, Reserved)
        assert await ledger.balance(client(WALLET)) == 9 * 10**20
        assert await ledger.balance(reserved(WALLET)) == 10**20
        closed = await ledger.settle(ended("job", 6 * 10**19))
        assert closed == Closed("job", captured=6 * 10**19, released=4 * 10**19)
        assert await ledger.balance(client(WALLET)) == 94 * 10**19
        assert await ledger.balance(reserved(WALLET)) == 0
        earned = split(3 * 10**19).worker
        assert await ledger.balance(worker(FIRST)) == earned
        assert await ledger.balance(PLATFORM) == 6 * 10**19 * 2 // 10
        await ledger.payout_plan("p", FIRST, "hyperliquid", "0xw", earned)
        assert await ledger.balance(worker(FIRST)) == 0
        assert await ledger.balance(paying(FIRST)) == earned
        await ledger.payout_signed(["p"], "0xt1", b"raw", nonce=0)
        await ledger.payout_sent(["p"])
        await ledger.payout_confirmed(["p"], "0xt1", fee=21_000)
        assert await ledger.balance(paying(FIRST)) == 0
        assert await ledger.balance(FEES) == -21_000
        assert await ledger.balance(chain("hyperliquid")) == -(10**21) + earned + 21_000
        (use,) = await ledger.usage(WALLET)
        assert (use.job_id, use.cost, use.completion_tokens) == ("job", 6 * 10**19, 3)


async def test_each_change_happens_once(url: str) -> None:
    async with opened(url) as ledger:
        for number in range(2):
            deposited = await ledger.deposit("solana", "main", "sig", WALLET, 100)
            assert deposited == Deposited("main", "sig", WALLET, 100, is_new=number == 0)
            # Whoever claims it again gets nothing, whatever is claimed.
            again = await ledger.deposit("solana", "main", "sig", OTHER, 999)
            assert again == Deposited("main", "sig", WALLET, 100, is_new=False)
            first = await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
            assert isinstance(first, Reserved)
            assert await ledger.reserve("job", OTHER, 70, expires_at=0) == first
        for cost in (30, 50):
            assert await ledger.settle(ended("job", cost)) == Closed("job", 30, 20)
        assert await ledger.release("job") == Closed("job", 30, 20)
        assert await ledger.balance(client(WALLET)) == 70
        assert await ledger.balance(client(OTHER)) == 0
        assert len(await ledger.export()) == 3


async def test_a_released_job_is_settled_once_more_at_the_platforms_expense(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
        for _ in range(2):
            assert await ledger.release("job") == Closed("job", captured=0, released=50)
        for cost in (300, 500):
            closed = await ledger.settle(ended("job", cost))
            assert isinstance(closed, Closed)
            assert await ledger.balance(worker(FIRST)) == split(150).worker
        assert await ledger.balance(PLATFORM) == -sum((await ledger.balances("worker")).values())
        assert await ledger.release("job") == Closed("job", captured=0, released=50)
        assert await ledger.balance(client(WALLET)) == 100
        assert [use.cost for use in await ledger.usage(WALLET)] == [300]


async def test_of_a_job_that_was_settled_late_a_client_gets_nothing_back(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
        await ledger.release("job")
        await ledger.settle(ended("job", 600, held=(0,)))
        assert await ledger.decide("job", 0, 0, "client") == "client"
        assert await ledger.balance(client(WALLET)) == 100


async def test_what_a_client_does_not_have_is_not_reserved(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        refused = await ledger.reserve("job", WALLET, 101, expires_at=FOREVER)
        assert isinstance(refused, Shortfall)
        assert (refused.code, refused.needed, refused.available) == ("insufficient_funds", 101, 100)
        refused = await ledger.reserve("job", OTHER, 1, expires_at=FOREVER)
        assert isinstance(refused, Shortfall)
        assert (await ledger.reserve("job", WALLET, 100, expires_at=FOREVER)).__class__ is Reserved
        assert len(await ledger.export()) == 2


async def test_a_job_that_is_not_reserved_is_paid_only_where_that_is_free(url: str) -> None:
    async with opened(url) as ledger:
        refused = await ledger.settle(ended("job", 30))
        assert isinstance(refused, Refusal)
        assert refused.code == "not_reserved"
        assert (await ledger.release("job")).__class__ is Refusal
        for _ in range(2):
            assert await ledger.settle(ended("job", 30, wallet=WALLET), is_free=True) == Closed("job", 30, 0)
        assert await ledger.balance(FREE) == -30
        assert sum((await ledger.balances("worker")).values()) + await ledger.balance(PLATFORM) == 30
        assert [use.cost for use in await ledger.usage(WALLET)] == [30]
        late = await ledger.reserve("job", WALLET, 0, expires_at=FOREVER)
        assert isinstance(late, Refusal)
        assert late.code == "job_settled"


async def test_held_earnings_are_nobodys(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.settle(ended("job", 600, held=(0,)), is_free=True)
        assert await ledger.balance(worker(FIRST)) == 0
        assert await ledger.balance(held(FIRST)) == split(300).worker
        assert FIRST not in await ledger.balances("worker")
        refused = await ledger.payout_plan("p", FIRST, "solana", "0xw", 1)
        assert isinstance(refused, Shortfall)


async def test_what_a_job_costs_beyond_its_reservation_the_platform_bears(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
        assert await ledger.settle(ended("job", 600)) == Closed("job", captured=50, released=0)
        assert sum((await ledger.balances("worker")).values()) == sum(split(each).worker for each in (300, 200, 100))
        assert await ledger.balance(PLATFORM) == 120 - 550


async def test_a_job_without_a_token_costs_nothing(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
        assert await ledger.settle(ended("job", 0)) == Closed("job", captured=0, released=50)
        assert len(await ledger.usage(WALLET)) == 1


async def test_limits_of_keys_are_read_where_they_are_spent(url: str) -> None:
    limits: dict[str, KeyLimit] = {"k": 100, "revoked": Refusal("key_revoked", "it is revoked"), "free": None}

    def key_limits(connection: Connection, key_ids: Collection[str]) -> dict[str, KeyLimit]:
        assert connection.in_transaction()
        return {key_id: limits[key_id] for key_id in key_ids}

    async with opened(url, key_limits=key_limits) as ledger:

        async def reserve(job_id: str, amount: int, key_id: str) -> Any:
            return await ledger.reserve(job_id, WALLET, amount, key_id, expires_at=FOREVER)

        await ledger.deposit("solana", "main", "sig", WALLET, 10_000)
        assert isinstance(await reserve("a", 60, "k"), Reserved)
        refused = await reserve("b", 41, "k")
        assert (refused.code, refused.available) == ("key_limit", 40)
        await ledger.settle(ended("a", 30))  # the rest may be spent again
        assert await ledger.spent("k") == 30
        assert isinstance(await reserve("b", 70, "k"), Reserved)
        await ledger.release("b")
        assert await ledger.spent("k") == 30
        assert (await reserve("c", 1, "revoked")).code == "key_revoked"
        assert isinstance(await reserve("c", 5_000, "free"), Reserved)
        limits["k"] = 0
        assert (await reserve("d", 1, "k")).available == 0


async def test_a_coordinator_releases_what_its_earlier_life_left(url: str) -> None:
    async with opened(url) as ledger, opened(url, owner="another") as neighbour:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("mine", WALLET, 10, expires_at=FOREVER)
        await ledger.reserve("ended", WALLET, 10, expires_at=FOREVER)
        await ledger.settle(ended("ended", 10))
        await neighbour.reserve("theirs", WALLET, 20, expires_at=FOREVER)
        await neighbour.reserve("abandoned", WALLET, 30, expires_at=1)
    async with opened(url) as ledger:
        released = {closed.job_id for closed in await ledger.release_abandoned() if isinstance(closed, Closed)}
        assert released == {"mine", "abandoned"}
        assert await ledger.release_abandoned() == []
        assert await ledger.balance(client(WALLET)) == 70
        assert await ledger.balance(reserved(WALLET)) == 20


async def test_amounts_that_cannot_be_are_refused(url: str) -> None:
    amounts: list[Any] = [-1, 0, 1.0, True, "7", None, MAX_AMOUNT, 10**5000]
    async with opened(url) as ledger:
        for amount in amounts:
            with pytest.raises(InputError) as raised:
                await ledger.deposit("solana", "main", "sig", WALLET, amount)
            assert raised.value.code == "bad_amount"
        assert await ledger.export() == []


async def test_the_largest_amount_fits(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, MAX_AMOUNT - 1)
        assert await ledger.balance(client(WALLET)) == MAX_AMOUNT - 1
        with pytest.raises(InternalError):  # more coin than there is
            await ledger.deposit("solana", "main", "sig2", WALLET, 1)
        assert len(await ledger.export()) == 1


async def test_names_that_cannot_be_are_refused(url: str) -> None:
    names: list[Any] = ["", "a b", "x" * 201, "a\n", "é", 7, None, "'"]
    async with opened(url) as ledger:
        for name in names:
            with pytest.raises(InputError) as raised:
                await ledger.deposit("solana", "main", "sig", name, 1)
            assert raised.value.code == "bad_name"


async def test_a_job_whose_workers_earn_more_than_it_costs_is_a_bug(url: str) -> None:
    async with opened(url) as ledger:
        with pytest.raises(InternalError) as raised:
            await ledger.settle(replace(ended("job", 600), cost=10), is_free=True)
        assert raised.value.code == "ledger_unbalanced"


async def test_a_statement_shows_the_balance_after_each_move(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        await ledger.reserve("job", WALLET, 50, expires_at=FOREVER)
        await ledger.settle(ended("job", 30))
        lines = await ledger.statement(client(WALLET))
        assert [(line.kind, line.amount, line.balance) for line in lines] == [
            ("deposit", 100, 100),
            ("reserve", -50, 50),
            ("settle", 20, 70),
        ]
        assert await ledger.statement(client(WALLET), since=FOREVER) == []
        assert await ledger.statement(client(OTHER)) == []


async def test_all_is_there_after_a_restart(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.deposit("solana", "main", "sig", WALLET, 100)
        before = await ledger.export()
    async with opened(url) as ledger:
        assert await ledger.export() == before
        assert not (await ledger.deposit("solana", "main", "sig", WALLET, 100)).is_new
