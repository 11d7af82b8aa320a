"""What a running coordinator does for its workers' wallets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from azu.identity import Identity
from azu.ledger import Ledger, PayoutState
from azu.payments import open_provider
from azu.payments.settings import PaymentSettings
from azu.records import WorkerRecord
from coordinator.paying import keep_paying
from tests.dht.records import worker
from tests.ledger.books import ended
from tests.payments.anvil import COIN, Chain, account

PLATFORM = account(0x9A7)
PEERS = [Identity(number.to_bytes(32, "big")).peer_id for number in (1, 2, 3)]
WALLET = account(0x401).address


class View:
    """The swarm as this coordinator sees it: one worker names a wallet, one names none, the third is away."""

    def workers(self) -> tuple[WorkerRecord, ...]:
        return worker(1, payout_address=WALLET.lower()), worker(2, payout_address="")


def settings(chain: Chain, monkeypatch: pytest.MonkeyPatch, **more: str) -> PaymentSettings:
    variables = {
        "HYPERLIQUID_RPC_URL": chain.url, "HYPERLIQUID_CHAIN_ID": "998", "HYPERLIQUID_CONFIRMATIONS": "1",
        "HYPERLIQUID_ADDRESS": PLATFORM.address, "PAYOUT_EVERY": "1", **more,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return PaymentSettings()


@pytest.mark.parametrize("has_key", [True, False], ids=["with the key", "without"])
async def test_who_names_a_wallet_is_paid(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_key: bool
) -> None:
    chain.fund(PLATFORM.address)
    key = {"SCHEDULER_PRIVATE_KEY": bytes(PLATFORM.key).hex()} if has_key else {}
    chosen = settings(chain, monkeypatch, **key)
    with trio.fail_after(60):
        async with (
            open_provider(chosen) as provider,
            Ledger.open(tmp_path / "ledger.sqlite3", currency="wei") as ledger,
            trio.open_nursery() as nursery,
        ):
            earnings = zip(PEERS, ended("job", COIN).earnings, strict=True)
            named = tuple(replace(earning, peer_id=peer) for peer, earning in earnings)
            await ledger.settle(ended("job", COIN, earnings=named), is_free=True)
            owed = await ledger.balances("worker")
            nursery.start_soon(keep_paying, chosen, ledger, provider, View())
            wanted: PayoutState = "confirmed" if has_key else "planned"
            while not (payouts := await ledger.payouts([wanted])):
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    assert [(each.peer_id, each.address) for each in payouts] == [(PEERS[0], WALLET)]
    assert chain.balance(WALLET) == (owed[PEERS[0]] if has_key else 0)
