"""Whole answers asked for with an Idempotency-Key: one answer, paid once, however often it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio

from azu.errors import NetworkError
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.paying import ALICE, BOB, PRICE, Bank, EvmWallet, cost, open_bank, write_locked
from tests.coordinator.api.twin import MODEL_ID, Twin

MONEY = 10**18
BODY = {
    "model": MODEL_ID,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 40,
}


@pytest.fixture
async def bank(twin: Twin, tmp_path: Path, empty_ledger: Path) -> AsyncIterator[Bank]:
    twin.price = PRICE
    async with open_bank(twin, tmp_path, empty_ledger, mode="open") as made:
        for number, wallet in enumerate((ALICE, BOB), 1):
            await made.pay_in(MONEY, wallet, number)
        yield made
        assert await made.ledger.verify() == []


async def ask(bank: Bank, key: str, wallet: EvmWallet = ALICE, **changes: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {wallet.address}", "Idempotency-Key": key}
    body = BODY | changes
    return await in_thread(
        partial(httpx.post, f"{bank.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    )


async def test_who_hangs_up_while_the_database_is_slow_finds_the_answer_all_the_same(
    bank: Bank, tmp_path: Path
) -> None:
    """The job is written down when its client has gone: it is not left there as one that nobody runs."""
    headers = {"Authorization": f"Bearer {ALICE.address}", "Idempotency-Key": "a"}
    post = partial(httpx.post, f"{bank.url}/v1/chat/completions", json=BODY, headers=headers, timeout=1)
    async with write_locked(tmp_path / "ledger.sqlite3"):
        with pytest.raises(httpx.ReadTimeout):
            await in_thread(post)
        await trio.sleep(0.3)  # until the coordinator has noticed
    with trio.fail_after(20):
        while (answer := await ask(bank, "a")).status_code == 503:  # it was there, and is about to be dropped
            await trio.sleep(0.1)
    assert answer.status_code == 200, answer.text
    assert await bank.has() == (MONEY - int(answer.json()["usage"]["azu"]["cost"]), 0)


async def test_whoever_asks_again_gets_the_same_and_pays_once(bank: Bank) -> None:
    first, again = await ask(bank, "a", n=2), await ask(bank, "a", n=2)
    assert first.status_code == 200
    assert first.json() == again.json()
    assert [choice["message"]["content"] for choice in first.json()["choices"]] == [bank.twin.answer] * 2
    assert len(bank.twin.requests) == 2
    assert await bank.has() == (MONEY - int(first.json()["usage"]["azu"]["cost"]), 0)
    reused = await ask(bank, "a", n=1)
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert (await ask(bank, "b", n=2)).json()["id"] != first.json()["id"]
    assert (await ask(bank, "a", BOB, n=2)).json()["id"] != first.json()["id"], "keys are their accounts'"
    job_id = first.json()["usage"]["azu"]["job_id"]
    assert (await bank.send("GET", f"/results/{job_id}", key=ALICE.address)).status_code == 404
    await bank.until_none_is_kept()


async def test_a_client_that_hangs_up_finds_its_answer(bank: Bank) -> None:
    bank.twin.pause_s = 0.02
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            await in_thread(
                partial(
                    httpx.post,
                    f"{bank.url}/v1/chat/completions",
                    json=BODY,
                    headers={"Authorization": f"Bearer {ALICE.address}", "Idempotency-Key": "k"},
                    timeout=0.05,
                )
            )
    found = await ask(bank, "k")
    assert found.json()["choices"][0]["message"]["content"] == bank.twin.answer
    assert len(bank.twin.requests) == 1


async def test_what_failed_is_tried_anew(bank: Bank) -> None:
    bank.twin.failure, bank.twin.fail_after = NetworkError("the line broke", code="stage_lost"), 3
    failed = await ask(bank, "k")
    assert (failed.status_code, failed.json()["error"]["code"]) == (502, "stage_lost")
    poor = await ask(bank, "k", EvmWallet(3))
    assert (poor.status_code, poor.json()["error"]["code"]) == (402, "insufficient_funds")
    bank.twin.failure = None
    assert (await ask(bank, "k")).status_code == 200
    assert len(bank.twin.requests) == 2


@pytest.mark.parametrize("key", ["x" * 256, "a b", "\x7f"])
async def test_bad_keys(bank: Bank, key: str) -> None:
    refused = await ask(bank, key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_idempotency_key")
    assert bank.twin.requests == []


async def test_it_outlives_a_restart(twin: Twin, tmp_path: Path, empty_ledger: Path) -> None:
    """The official client is told to come back, and what it gets then is not begun again."""
    twin.price, twin.stall_after, twin.stalling, stop = PRICE, 5, 11, trio.Event()
    refused: list[httpx.Response] = []
    async with open_bank(twin, tmp_path, empty_ledger, mode="open", stop=stop) as bank, trio.open_nursery() as nursery:
        await bank.pay_in(MONEY)

        async def first() -> None:
            refused.append(await ask(bank, "k", n=2, seed=10))

        nursery.start_soon(first)
        await twin.stalled.wait()
        while twin.finished < 1:
            await trio.sleep(0.02)
        stop.set()
    assert (refused[0].status_code, refused[0].json()["error"]["code"]) == (503, "restarting")
    assert refused[0].headers["Retry-After"] == "5"
    twin.stall_after = None
    async with open_bank(twin, tmp_path, empty_ledger, mode="open", is_new=False) as bank:
        client = openai.OpenAI(base_url=f"{bank.url}/v1", api_key=ALICE.address, max_retries=0, timeout=30)
        create: Any = client.chat.completions.create
        found = await in_thread(partial(create, **BODY, n=2, seed=10, extra_headers={"Idempotency-Key": "k"}))
        assert [choice.message.content for choice in found.choices] == [twin.answer] * 2
        assert [ticket.sampling.seed for ticket in twin.taken_up] == [11]
        positions = sum(2 * [found.usage.prompt_tokens - 1]) + found.usage.completion_tokens
        await bank.until_none_is_kept()
        assert await bank.has() == (MONEY - cost(positions), 0)
        assert await bank.ledger.verify() == []
