"""From the till to the workers' accounts: what was put aside is settled once, whichever chain of workers it was."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.errors import NetworkError
from azu.ledger import Ledger
from azu.payments.addresses import check_evm_address
from azu.payments.factory import open_provider
from azu.payments.settings import PaymentSettings
from coordinator.api.till import Till
from coordinator.generation import GenerationRequest, known_as
from coordinator.meter import Meter
from coordinator.unsettled import Unsettled
from tests.coordinator.fake_workers import Plan, Swarm, honest, idle, refuses, request, swarm_of

WALLET = check_evm_address("0x00000000000000000000000000000000000000bb")
PRICE = 2
LAYERS = 4
MONEY = 10_000


class Bank:
    """A swarm whose jobs are paid for."""

    def __init__(self, swarm: Swarm, ledger: Ledger, till: Till) -> None:
        self.swarm = swarm
        self.ledger = ledger
        self.till = till

    async def ask(self, asked: GenerationRequest) -> list[int]:
        async with self.till.reserved([asked]), self.swarm.runner.generate(asked) as job:
            tokens = [sampled.token async for sampled in job.tokens()]
            await job.finish()
            return tokens

    async def has(self) -> tuple[int, int]:
        client, reserved = f"client:{WALLET}", f"reserved:{WALLET}"
        return await self.ledger.balance(client), await self.ledger.balance(reserved)


@asynccontextmanager
async def bank_of(tmp_path: Path, *plans: Plan) -> AsyncIterator[Bank]:
    settings = PaymentSettings(
        payment_provider="hyperliquid",
        hyperliquid_rpc_url=("http://127.0.0.1:9",),
        hyperliquid_address="0x00000000000000000000000000000000000000aa",
    )
    async with (
        swarm_of(tmp_path, *plans) as swarm,
        open_provider(settings) as provider,
        Ledger.open(tmp_path / "paid.sqlite3", currency="wei") as ledger,
    ):
        swarm.runner._meter = Meter(ledger, is_free=False)
        await ledger.deposit("hyperliquid", provider.chain, "0x1", WALLET, MONEY)
        yield Bank(swarm, ledger, Till(ledger, provider, PRICE))
        assert await ledger.verify() == []


def paid(max_tokens: int = 3) -> GenerationRequest:
    return replace(request(max_tokens), wallet=WALLET)


async def test_a_job_pays_its_workers_and_gives_back_the_rest(tmp_path: Path) -> None:
    async with bank_of(tmp_path, (0, 4, honest)) as bank:
        asked = paid()
        positions = len(asked.prompt) + 3 - 1
        async with bank.till.reserved([asked]), bank.swarm.runner.generate(asked) as job:
            assert await bank.has() == (MONEY - positions * LAYERS * PRICE, positions * LAYERS * PRICE)
            async with aclosing(job.tokens()) as tokens:
                assert (await anext(tokens)).token == 7  # and no more of them is read
            report = await job.finish()
        cost = (len(asked.prompt) + report.completion_tokens - 1) * LAYERS * PRICE
        assert report.cost == cost
        assert await bank.has() == (MONEY - cost, 0)
        assert report.job_id == known_as(asked.job_id)
        (use,) = await bank.ledger.usage(WALLET)
        assert (use.job_id, use.cost) == (asked.job_id.hex(), cost)


async def test_what_is_put_aside_for_a_job_that_is_settled_later_stays_so(tmp_path: Path) -> None:
    """The database was away when the job ended, and is back when its client has gone."""
    async with bank_of(tmp_path, (0, 4, honest)) as bank:
        async with Ledger.open(tmp_path / "paid.sqlite3", currency="wei") as away:
            pass
        unsettled = Unsettled(tmp_path)
        bank.swarm.runner._meter = Meter(away, is_free=False, unsettled=unsettled)
        till = Till(bank.ledger, bank.till._provider, PRICE, unsettled)
        asked = paid()
        cost = (len(asked.prompt) + 3 - 1) * LAYERS * PRICE

        async def ask_and_leave() -> None:
            async with till.reserved([asked]), bank.swarm.runner.generate(asked) as job:
                assert [sampled.token async for sampled in job.tokens()] == [7, 8, 9]
                await job.finish()
                raise NetworkError("the client has gone")

        with pytest.raises(BaseExceptionGroup):
            await ask_and_leave()
        assert await bank.has() == (MONEY - cost, cost)
        await Meter(bank.ledger, is_free=False, unsettled=unsettled).settle_kept()
        assert await bank.has() == (MONEY - cost, 0)
        assert sum((await bank.ledger.balances("worker")).values()) > 0


async def test_another_chain_is_paid_out_of_the_same_reservation(tmp_path: Path) -> None:
    async with bank_of(tmp_path, (0, 4, refuses("not_loaded")), (0, 4, honest)) as bank:
        liar, good = bank.swarm.workers
        bank.swarm.view.blame(good.peer_id, 1, NetworkError("so that the liar comes first"))
        asked = paid()
        assert await bank.ask(asked) == [7, 8, 9]
        assert (len(liar.tickets), len(good.tickets)) == (1, 1)
        assert liar.tickets[0].job_id != good.tickets[0].job_id, "a worker takes no job's id twice"
        assert known_as(liar.tickets[0].job_id) == known_as(good.tickets[0].job_id) == asked.job_id.hex()
        cost = (len(asked.prompt) + 3 - 1) * LAYERS * PRICE
        assert await bank.has() == (MONEY - cost, 0)
        owed = await bank.ledger.balances("worker") | await bank.ledger.balances("held")
        assert set(owed) == {good.peer_id}
        assert len(await bank.ledger.usage(WALLET)) == 1


async def test_a_job_that_no_chain_takes_costs_nothing(tmp_path: Path) -> None:
    async with bank_of(tmp_path, (0, 4, refuses("not_loaded"))) as bank:
        with pytest.raises(BaseExceptionGroup):
            await bank.ask(paid())
        assert len(bank.swarm.workers[0].tickets) == 3
        assert await bank.has() == (MONEY, 0)


async def test_what_is_put_aside_for_a_job_without_a_token_is_left_to_whoever_begins_it_again(tmp_path: Path) -> None:
    """A coordinator that stops then: its next life tries other chains, for other ids of the same job."""
    async with bank_of(tmp_path, (0, 4, idle)) as bank:
        asked = replace(paid(), first_chain=16)
        await bank.ledger.reserve(asked.job_id.hex(), WALLET, 50, expires_at=2**40)

        async def run() -> None:
            async with bank.swarm.runner.generate(asked):
                raise AssertionError("it gives no token")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not bank.swarm.workers[0].tickets:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert await bank.has() == (MONEY - 50, 50)
        assert [ticket.job_id for ticket in bank.swarm.workers[0].tickets] == [asked.job_id[:-1] + b"\x10"]
        await bank.ledger.release(asked.job_id.hex())


async def test_a_client_that_leaves_before_the_first_token_pays_nothing(tmp_path: Path) -> None:
    async with bank_of(tmp_path, (0, 4, idle)) as bank:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bank.ask, paid())
                while not bank.swarm.workers[0].tickets:
                    await trio.sleep(0.01)
                assert (await bank.has())[1] > 0
                scope.cancel()
        assert await bank.has() == (MONEY, 0)
