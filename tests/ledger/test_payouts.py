"""Payouts: a worker's money leaves once, whatever order things come in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from azu.ledger import Ledger, Payout, Refusal, Shortfall
from azu.ledger.accounts import FEES, chain, paying, worker
from tests.ledger.books import PEERS, ended, opened

ONE, TWO, THREE = PEERS


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[Ledger]:
    """One that owes 240, 160 and 80."""
    async with opened(url) as ledger:
        await ledger.settle(ended("job", 600), is_free=True)
        yield ledger


async def plan(ledger: Ledger, payout_id: str, peer_id: str, amount: int) -> Payout:
    planned = await ledger.payout_plan(payout_id, peer_id, "solana", f"wallet-{peer_id}", amount)
    assert isinstance(planned, Payout)
    return planned


def refusal(answer: object) -> str:
    assert isinstance(answer, Refusal)
    return answer.code


async def test_the_same_payout_is_planned_once(ledger: Ledger) -> None:
    first = await plan(ledger, "p", ONE, 200)
    assert await plan(ledger, "p", ONE, 200) == first
    refused = await ledger.payout_plan("q", ONE, "solana", "w", 41)
    assert isinstance(refused, Shortfall)
    assert (refused.needed, refused.available) == (41, 40)
    assert await ledger.balance(paying(ONE)) == 200


async def test_a_transaction_that_pays_several_is_written_down_for_all_or_none(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 240)
    await plan(ledger, "q", TWO, 160)
    assert refusal(await ledger.payout_signed(["p", "unknown"], "t", b"raw")) == "no_such_payout"
    assert [payout.state for payout in await ledger.payouts()] == ["planned"] * 2
    await ledger.payout_signed(["p", "q"], "t", b"raw", nonce=7)
    await ledger.payout_signed(["p", "q"], "t", b"raw", nonce=7)
    assert {payout.txid for payout in await ledger.payouts(["signed"])} == {"t"}
    for payout_id in ("p", "q"):
        (signed,) = await ledger.signings(payout_id)
        assert (signed.txid, signed.raw, signed.nonce) == ("t", b"raw", 7)
    await ledger.payout_confirmed(["p", "q"], "t", fee=101)
    await ledger.payout_confirmed(["p", "q"], "t", fee=101)
    assert [payout.fee for payout in sorted(await ledger.payouts(), key=lambda each: each.payout_id)] == [51, 50]
    assert await ledger.balance(FEES) == -101
    assert await ledger.balance(chain("solana")) == 240 + 160 + 101


async def test_one_that_replaces_another_may_be_the_one_that_lands(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 240)
    await ledger.payout_signed(["p"], "cheap", b"1", nonce=3)
    await ledger.payout_sent(["p"])
    await ledger.payout_signed(["p"], "dear", b"2", nonce=3)
    (payout,) = await ledger.payouts()
    assert (payout.state, payout.txid) == ("signed", "dear")
    await ledger.payout_sent(["p"])
    assert [signed.txid for signed in await ledger.signings("p")] == ["cheap", "dear"]
    assert refusal(await ledger.payout_confirmed(["p"], "strange", fee=1)) == "not_signed"
    await ledger.payout_confirmed(["p"], "cheap", fee=1)
    (payout,) = await ledger.payouts(["confirmed"])
    assert payout.txid == "cheap"


async def test_of_two_runners_that_sign_one_payout_the_second_is_too_late(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 240)
    await ledger.payout_signed(["p"], "t", b"raw", nonce=3, is_first=True)
    assert refusal(await ledger.payout_signed(["p"], "u", b"raw", nonce=4, is_first=True)) == "payout_signed"
    await ledger.payout_signed(["p"], "t", b"raw", nonce=3, is_first=True)
    assert [signed.txid for signed in await ledger.signings("p")] == ["t"]


async def test_what_failed_on_the_chain_has_cost_its_fee(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 240)
    await ledger.payout_signed(["p"], "t", b"raw")
    for _ in range(2):
        await ledger.payout_failed(["p"], "refused by the payee", fee=5)
    assert (await ledger.balance(worker(ONE)), await ledger.balance(FEES)) == (240, -5)
    assert await ledger.balance(chain("solana")) == 5


async def test_a_failed_payout_gives_the_money_back_once(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 240)
    await ledger.payout_signed(["p"], "t", b"raw")
    for _ in range(2):
        await ledger.payout_failed(["p"], "its blockhash ran out")
    assert await ledger.balance(worker(ONE)) == 240
    assert await ledger.balance(paying(ONE)) == 0
    (payout,) = await ledger.payouts(peer_id=ONE)
    assert (payout.state, payout.reason) == ("failed", "its blockhash ran out")


async def test_what_is_over_stays_as_it_is(ledger: Ledger) -> None:
    await plan(ledger, "p", ONE, 100)
    assert refusal(await ledger.payout_sent(["p"])) == "payout_state"
    assert refusal(await ledger.payout_confirmed(["p"], "t", fee=0)) == "payout_state"
    await ledger.payout_signed(["p"], "t", b"raw")
    await ledger.payout_confirmed(["p"], "t", fee=0)
    assert refusal(await ledger.payout_failed(["p"], "no")) == "payout_state"
    assert refusal(await ledger.payout_signed(["p"], "u", b"raw")) == "payout_state"
    await plan(ledger, "q", ONE, 100)
    await ledger.payout_failed(["q"], "no")
    assert refusal(await ledger.payout_confirmed(["q"], "t", fee=0)) == "payout_state"
    assert await ledger.balance(worker(ONE)) == 140
