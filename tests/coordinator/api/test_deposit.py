"""From a transaction on a real chain to an answer that it paid for, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.paying import ALICE, BOB, PLATFORM, PRICE, Bank, open_bank
from tests.coordinator.api.twin import MODEL_ID, Twin
from tests.payments.anvil import CHAIN_ID, COIN, Chain
from tests.payments.conftest import anvil, chain

__all__ = ["anvil", "chain"]

BODY: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}


@pytest.fixture
async def bank(twin: Twin, tmp_path: Path, empty_ledger: Path, chain: Chain) -> AsyncIterator[Bank]:
    twin.price = PRICE
    for wallet in (ALICE, BOB):
        chain.fund(wallet.address)
    settings = {"hyperliquid_rpc_url": (chain.url,), "hyperliquid_chain_id": CHAIN_ID}
    async with open_bank(twin, tmp_path, empty_ledger, settings=settings) as made:
        yield made
        assert await made.ledger.verify() == []


async def claim(bank: Bank, txid: str, wallet: str) -> tuple[int, dict[str, Any]]:
    response = await bank.send("POST", "/deposit", json={"tx_sig": txid, "user_pubkey": wallet})
    answer: dict[str, Any] = response.json()
    return response.status_code, answer


def code_of(answer: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


async def test_a_deposit_pays_for_an_answer(bank: Bank, chain: Chain) -> None:
    key = await bank.key()
    assert (await bank.send("POST", "/v1/chat/completions", key=key, json=BODY)).status_code == 402
    txid = await in_thread(lambda: chain.transfer(ALICE.account, PLATFORM, COIN))
    while (refused := code_of(await claim(bank, txid, ALICE.address))) == (409, "tx_pending"):
        await trio.sleep(0.02)  # a receipt may lag the transaction
    assert refused == (409, "tx_unconfirmed")
    await in_thread(lambda: chain.mine(3))
    status, credited = await claim(bank, txid, ALICE.address.lower())
    assert (status, credited["amount"], credited["balance"]) == (200, str(COIN), str(COIN))
    assert credited["wallet"] == ALICE.address
    answer = await bank.send("POST", "/v1/chat/completions", key=key, json=BODY)
    assert answer.status_code == 200
    assert await bank.has() == (COIN - answer.json()["usage"]["azu"]["cost"], 0)


async def test_a_transaction_counts_once_and_for_its_sender(bank: Bank, chain: Chain) -> None:
    txid = await in_thread(lambda: chain.transfer(ALICE.account, PLATFORM, COIN))
    await in_thread(lambda: chain.mine(3))
    assert code_of(await claim(bank, txid, BOB.address)) == (400, "wrong_sender")
    answers: list[tuple[int, dict[str, Any]]] = []

    async def claim_it() -> None:
        answers.append(await claim(bank, txid, ALICE.address))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(claim_it)
    assert sorted(status for status, _ in answers) == [200, 409, 409, 409]
    assert code_of(await claim(bank, txid.upper().replace("0X", "0x"), ALICE.address)) == (409, "already_claimed")
    assert await bank.has(ALICE) == (COIN, 0)
    assert await bank.has(BOB) == (0, 0)


async def test_what_is_no_deposit(bank: Bank, chain: Chain) -> None:
    elsewhere = await in_thread(lambda: chain.transfer(ALICE.account, BOB.address, COIN))
    little = await in_thread(lambda: chain.transfer(ALICE.account, PLATFORM, 1))
    await in_thread(lambda: chain.mine(3))
    assert code_of(await claim(bank, elsewhere, ALICE.address)) == (400, "wrong_recipient")
    assert code_of(await claim(bank, little, ALICE.address)) == (400, "deposit_too_small")
    assert code_of(await claim(bank, "0x" + "1" * 64, ALICE.address)) == (404, "tx_not_found")
    assert await bank.has() == (0, 0)
