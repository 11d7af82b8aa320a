"""The same runner on Solana: what expires is paid by another payout, once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from solders.keypair import Keypair

from azu.ledger import Ledger
from azu.payments import SignedPayout
from azu.payments.payouts import Payouts
from azu.payments.rpc import Limits, Rpc
from azu.payments.solana import Solana, chain_check
from azu.payments.solana_account import solana_account
from tests.ledger.books import PEERS, ended
from tests.payments.solana_runtime import GENESIS

SEED = bytes([7]) * 32
WALLETS = {peer: str(Keypair.from_seed(bytes([40 + number]) * 32).pubkey()) for number, peer in enumerate(PEERS)}
COST = 10**9 + 7
FEE = 5_000

Ask = Callable[..., Any]


@asynccontextmanager
async def opened(url: str, place: Path) -> AsyncIterator[tuple[Payouts, Ledger, Solana]]:
    signer = solana_account(SEED)
    with trio.fail_after(120):
        async with (
            Rpc([url], chain_check(GENESIS), limits=Limits(5.0, 1.0)) as rpc,
            Ledger.open(place, currency="lamport") as ledger,
        ):
            provider = Solana(rpc, genesis=GENESIS, address=signer.address, account=signer, min_deposit=1)
            yield Payouts(ledger, provider, threshold=1_000_000), ledger, provider
            assert await ledger.verify() == []


@pytest.fixture(autouse=True)
def funded(ask: Ask) -> None:
    ask("airdrop", solana_account(SEED).address, 10 * 10**9)


def paid(ask: Ask) -> dict[str, int]:
    return {peer: int(ask("getBalance", wallet)["value"]) for peer, wallet in WALLETS.items()}


async def test_workers_are_paid_to_the_last_lamport(solana: str, ask: Ask, tmp_path: Path) -> None:
    async with opened(solana, tmp_path / "ledger.sqlite3") as (payouts, ledger, _):
        await ledger.settle(ended("job", COST), is_free=True)
        owed = await ledger.balances("worker")
        await payouts.plan(WALLETS)
        assert (await payouts.advance()).left == 3
        progress = await payouts.advance()
        assert {payout.state for payout in progress.ended} == {"confirmed"}
        assert paid(ask) == owed
        assert await ledger.balance("fees") == -3 * FEE


async def test_a_payout_that_expired_before_it_was_sent_is_made_anew(solana: str, ask: Ask, tmp_path: Path) -> None:
    place = tmp_path / "ledger.sqlite3"
    async with opened(solana, place) as (payouts, ledger, provider):
        await ledger.settle(ended("job", COST), is_free=True)
        owed = await ledger.balances("worker")
        await payouts.plan(WALLETS)
        for payout in await payouts.open():  # signed and written down, and then the process dies
            signed = await provider.sign_payout(payout.address, payout.amount, label="", after=None)
            assert isinstance(signed, SignedPayout)
            await ledger.payout_signed([payout.payout_id], signed.txid, signed.raw, signed.nonce, is_first=True)
    ask("expireBlockhash")
    async with opened(solana, place) as (payouts, ledger, _):
        progress = await payouts.advance()
        assert {payout.state for payout in progress.ended} == {"failed"}
        assert await ledger.balances("worker") == owed
        await payouts.plan(WALLETS)
        await payouts.advance()
        assert len((await payouts.advance()).ended) == 3
        assert paid(ask) == owed
