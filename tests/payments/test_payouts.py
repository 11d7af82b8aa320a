"""Workers are paid out of the ledger on a real chain, whatever dies in between."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from azu.errors import InternalError
from azu.ledger import Ledger, Payout, Refusal
from azu.ledger.accounts import FEES, paying, worker
from azu.ledger.accounts import chain as coin_on
from azu.payments import SignedPayout
from azu.payments.evm_account import evm_account
from azu.payments.hyperliquid import Hyperliquid, chain_check
from azu.payments.payouts import Payouts
from azu.payments.rpc import Limits, Rpc
from tests.ledger.books import PEERS, ended
from tests.payments.anvil import CHAIN_ID, COIN, GAS_PRICE, Chain, account
from tests.payments.proxy import Proxy

KEY = (0x9A7).to_bytes(32, "big")
PLATFORM = account(0x9A7)
WALLETS = {peer: account(0x400 + number).address for number, peer in enumerate(PEERS)}
COST = COIN + 7  # the three are owed about 0.4, 0.27 and 0.13
THRESHOLD = COIN // 1000


@pytest.fixture(autouse=True)
def funded(chain: Chain) -> None:
    chain.fund(PLATFORM.address)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@asynccontextmanager
async def opened(url: str, place: Path, **options: Any) -> AsyncIterator[tuple[Payouts, Ledger, Hyperliquid]]:
    """A runner, as one process would have it; at its end the ledger has to be well."""
    signer = evm_account(KEY)
    with trio.fail_after(120):
        async with (
            Rpc([url], chain_check(CHAIN_ID), limits=Limits(2.0, 1.0)) as rpc,
            Ledger.open(place, currency="wei") as ledger,
        ):
            provider = Hyperliquid(
                rpc, chain_id=CHAIN_ID, address=signer.address, account=signer, confirmations=2, min_deposit=1
            )
            yield Payouts(ledger, provider, **{"threshold": THRESHOLD, **options}), ledger, provider
            assert await ledger.verify() == []


async def earn(ledger: Ledger, job: str = "job") -> dict[str, int]:
    await ledger.settle(ended(job, COST), is_free=True)
    return await ledger.balances("worker")


async def finish(payouts: Payouts, chain: Chain) -> list[Payout]:
    """Rounds until nothing is under way."""
    over: list[Payout] = []
    for _ in range(20):
        progress = await payouts.advance()
        over += progress.ended
        if not progress.left:
            return over
        chain.mine()
    raise AssertionError(f"{await payouts.open()} after 20 rounds")


def paid(chain: Chain) -> dict[str, int]:
    return {peer: chain.balance(wallet) for peer, wallet in WALLETS.items()}


async def test_every_worker_gets_what_it_is_owed_to_the_last_wei(chain: Chain, place: Path) -> None:
    async with opened(chain.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        assert len(await payouts.plan(WALLETS)) == 3
        assert await payouts.plan(WALLETS) == []
        over = await finish(payouts, chain)
        assert [payout.state for payout in over] == ["confirmed"] * 3
        assert paid(chain) == owed
        assert await ledger.balances("worker") == {}
        assert await ledger.balances("paying") == {}
        fees = sum(payout.fee for payout in over)
        assert await ledger.balance(FEES) == -fees
        assert chain.balance(PLATFORM.address) == 100 * COIN - sum(owed.values()) - fees
        assert await ledger.balance(coin_on("hyperliquid")) == sum(owed.values()) + fees
        assert await finish(payouts, chain) == []


async def test_who_is_owed_too_little_or_names_no_wallet_waits(chain: Chain, place: Path) -> None:
    one, two, three = PEERS
    async with opened(chain.url, place, threshold=COIN // 5) as (payouts, ledger, _):
        owed = await earn(ledger)
        assert owed[three] < COIN // 5 < owed[two]
        (planned,) = await payouts.plan({one: WALLETS[one], two: "me", three: WALLETS[three]})
        assert (planned.peer_id, planned.address, planned.amount) == (one, WALLETS[one], owed[one])
        assert await payouts.plan({one: WALLETS[one]}) == []
        assert await payouts.plan({two: ""}) == []
        assert len(await payouts.plan(WALLETS)) == 1
        assert await ledger.balance(worker(three)) == owed[three]


class Crash(BaseException):
    """The process dies here."""


async def live(payouts: Payouts, chain: Chain) -> None:
    await payouts.plan(WALLETS)
    for _ in range(5):
        await payouts.advance()
        chain.mine()


# Where it dies in a payout's life, and what the next process has to find on the chain already.
CRASHES = ("payout_plan", "sign_payout", "payout_signed", "send", "send, done", "payout_sent", "payout_confirmed")


@pytest.mark.parametrize("where", CRASHES)
async def test_a_crash_pays_nobody_twice_and_forgets_nobody(
    chain: Chain, place: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, after = where.partition(", ")
    target: Any = Hyperliquid if name in ("sign_payout", "send") else Ledger
    real = getattr(target, name)

    async def die(*args: Any, **options: Any) -> None:
        if after:
            await real(*args, **options)
        raise Crash

    async with opened(chain.url, place) as (_, ledger, _):
        owed = await earn(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, die)
        async with opened(chain.url, place) as (payouts, _, _):
            with pytest.raises(Crash):
                await live(payouts, chain)
    async with opened(chain.url, place) as (payouts, _, _):
        await payouts.plan(WALLETS)
        assert {payout.state for payout in await finish(payouts, chain)} == {"confirmed"}
    assert paid(chain) == owed
    assert chain.count(PLATFORM.address) == 3


async def test_two_runners_at_once_pay_once(chain: Chain, place: Path) -> None:
    async with (
        opened(chain.url, place) as (first, ledger, _),
        opened(chain.url, place) as (second, _, _),
    ):
        owed = await earn(ledger)
        for _ in range(12):
            async with trio.open_nursery() as nursery:
                for runner in (first, second):
                    nursery.start_soon(runner.plan, WALLETS)
            async with trio.open_nursery() as nursery:
                for runner in (first, second):
                    nursery.start_soon(runner.advance)
            chain.mine(2)
        assert paid(chain) == owed
        assert await ledger.balances("paying") == await ledger.balances("worker") == {}


async def test_an_rpc_that_fails_holds_payouts_up_and_loses_none(chain: Chain, proxy: Proxy, place: Path) -> None:
    async with opened(proxy.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        await payouts.plan(WALLETS)
        proxy.rate_limit()
        progress = await payouts.advance()
        assert (progress.ended, progress.left) == ((), 3)
        assert "rate" in progress.problem
        proxy.heal()
        proxy.swallow("eth_sendRawTransaction")  # the node takes them, and nobody hears of it
        await payouts.advance()
        proxy.heal()
        await finish(payouts, chain)
        assert paid(chain) == owed


async def test_fees_that_rise_do_not_hold_a_payout_up_for_ever(chain: Chain, place: Path) -> None:
    one = PEERS[0]
    chain.ask("evm_setAutomine", False)
    async with opened(chain.url, place, stuck_s=-1) as (payouts, ledger, _):
        owed = await earn(ledger)
        await payouts.plan({one: WALLETS[one]})
        await payouts.advance()
        (first,) = await payouts.open()
        await payouts.advance()
        assert len(await ledger.signings(first.payout_id)) == 1, "it waits for a block, and offers enough"
        chain.ask("anvil_setNextBlockBaseFeePerGas", hex(20 * GAS_PRICE))
        chain.mine()
        assert chain.count(PLATFORM.address) == 0
        (over,) = await finish(payouts, chain)
        assert (over.state, over.txid != first.txid) == ("confirmed", True)
        assert over.fee > 21_000 * 8 * GAS_PRICE
    assert chain.balance(WALLETS[one]) == owed[one]
    assert chain.count(PLATFORM.address) == 1


async def test_a_platform_without_money_pays_once_it_has_some(chain: Chain, place: Path) -> None:
    chain.fund(PLATFORM.address, 0)
    async with opened(chain.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        await payouts.plan(WALLETS)
        progress = await payouts.advance()
        assert "lacks" in progress.problem
        assert {payout.state for payout in await payouts.open()} == {"planned"}
        chain.fund(PLATFORM.address)
        await finish(payouts, chain)
        assert paid(chain) == owed


async def test_a_wallet_that_refuses_is_left_alone_until_another_is_named(chain: Chain, place: Path) -> None:
    one = PEERS[0]
    chain.ask("anvil_setCode", WALLETS[one], "0x60006000fd")
    async with opened(chain.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        await payouts.plan({one: WALLETS[one]})
        (failed,) = await finish(payouts, chain)
        assert failed.state == "failed"
        assert "cannot be paid" in failed.reason
        assert await ledger.balance(worker(one)) == owed[one]
        assert await payouts.plan({one: WALLETS[one]}) == []
        other = account(0x500).address
        await payouts.plan({one: other})
        await finish(payouts, chain)
        assert chain.balance(other) == owed[one]


async def test_a_wallet_that_refuses_on_the_chain_costs_the_fee(chain: Chain, place: Path) -> None:
    one = PEERS[0]
    async with opened(chain.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        await payouts.plan({one: WALLETS[one]})
        chain.ask("evm_setAutomine", False)
        await payouts.advance()
        chain.ask("anvil_setCode", WALLETS[one], "0x60006000fd")
        (failed,) = await finish(payouts, chain)
        assert (failed.state, await ledger.balance(worker(one))) == ("failed", owed[one])
        assert failed.fee == -await ledger.balance(FEES) == 100 * COIN - chain.balance(PLATFORM.address) > 0


async def test_a_nonce_that_the_operator_used_costs_a_round(chain: Chain, place: Path) -> None:
    one = PEERS[0]
    async with opened(chain.url, place) as (payouts, ledger, provider):
        owed = await earn(ledger)
        await payouts.plan({one: WALLETS[one]})
        (payout,) = await payouts.open()
        signed = await provider.sign_payout(WALLETS[one], owed[one], label="", after=None)
        assert isinstance(signed, SignedPayout)
        await ledger.payout_signed([payout.payout_id], signed.txid, signed.raw, signed.nonce)  # and the process dies
        chain.transfer(PLATFORM, account(0x501).address, 1)
        (lost,) = await finish(payouts, chain)
        assert (lost.state, lost.reason[:5]) == ("failed", "lost:")
        await payouts.plan({one: WALLETS[one]})
        await finish(payouts, chain)
    assert chain.balance(WALLETS[one]) == owed[one]


async def test_what_was_signed_long_ago_is_given_up_by_a_person_only(
    chain: Chain, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = PEERS[0]
    async with opened(chain.url, place) as (payouts, ledger, provider):
        owed = await earn(ledger)
        await payouts.plan({one: WALLETS[one]})
        (payout,) = await payouts.open()
        signed = await provider.sign_payout(WALLETS[one], owed[one], label="", after=None)
        assert isinstance(signed, SignedPayout)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1_700_000_000.0)
            await ledger.payout_signed([payout.payout_id], signed.txid, signed.raw, signed.nonce)
        refusal = await payouts.give_up(payout.payout_id)
        assert isinstance(refusal, Refusal)
        assert refusal.code == "not_lost"
        chain.transfer(PLATFORM, account(0x501).address, 1)
        for _ in range(3):
            assert (await payouts.advance()).left == 1
            chain.mine(2)
        assert await ledger.balance(paying(one)) == owed[one]
        given_up = await payouts.give_up(payout.payout_id)
        assert isinstance(given_up, Payout)
        assert given_up.state == "failed"
        assert await ledger.balance(worker(one)) == owed[one]


async def test_another_providers_payouts_are_left_alone(chain: Chain, place: Path) -> None:
    async with opened(chain.url, place) as (payouts, ledger, _):
        owed = await earn(ledger)
        await ledger.payout_plan("p", PEERS[0], "solana", "w", owed[PEERS[0]])
        assert await payouts.open() == []
        assert (await payouts.advance()).left == 0


async def test_a_ledger_that_fails_stops_it(chain: Chain, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written down is not sent."""
    async with opened(chain.url, place) as (payouts, ledger, _):
        await earn(ledger)
        await payouts.plan(WALLETS)

        async def fail(*_: object, **__: object) -> None:
            raise InternalError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "payout_signed", fail)
            with pytest.raises(InternalError):
                await payouts.advance()
        assert chain.count(PLATFORM.address) == 0
